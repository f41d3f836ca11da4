"""Starts that come from data: EVA's directions and ranks."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import LIBRARIES, call_chain, chain, llama
from benchmarks.suite import LORICA, PEFT, Case, Contest, measure
from lorica.bench.timing import Task

#: By how much (relative) the variance explained may differ: PEFT's decomposition is a sketch.
TOLERANCE = 2e-2


def batches(count: int, rows: int, width: int) -> list[Tensor]:
    """Return rows whose variances fall, in a turned basis: their leading directions settle."""
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(width, width)).Q
    spread = 0.9 ** torch.arange(width).clamp(max=60)
    return [(torch.randn(rows, width) * spread) @ turn for _ in range(count)]


def covariances(model: nn.Module, data: list[Any], call: Any) -> dict[str, Tensor]:
    """Return the covariance of each linear's inputs, dense."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(name, []).append(args[0].flatten(0, -2))

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(partial(note, name)) for name, module in linears]
    with torch.no_grad():
        for x in data:
            call(model, x)
    for handle in handles:
        handle.remove()
    return {name: torch.cov(torch.cat(parts).T) for name, parts in seen.items()}


def contest(model: nn.Module, data: list[Any], call: Any, shares_of: Any, **functions: Any) -> Contest:
    """Return the contest of ``get_eva_state_dict``; the result is what share of the inputs' variance A explains.

    Args:
        model: all of its linears are targets.
        data: the batches.
        call: runs the model on one.
        shares_of: what is compared of the shares of the layers.
        functions: for both libraries.
    """
    wanted = covariances(model, data, call)

    def task(side: str) -> Task:
        library = LIBRARIES[side]
        config = library.LoraConfig(
            r=16, target_modules=[*wanted], init_lora_weights="eva", eva_config=library.EvaConfig()
        )

        def run() -> Tensor:
            found = library.get_eva_state_dict(
                model, data, config, forward_fn=call, show_progress_bar=False, **functions
            )
            shares = [(a.float() @ wanted[name] * a.float()).sum() / wanted[name].trace() for name, a in found.items()]
            return shares_of(torch.stack(shares))

        return Task(run)

    return Contest({side: task(side) for side in (PEFT, LORICA)}, rounds=6, tolerance=TOLERANCE)


def build(quick: bool, *, layers: int, width: int, rows: int) -> Contest:
    """Return the contest on linears one after the other; the shares are compared layer by layer."""
    width, rows = (width // 4, rows // 4) if quick else (width, rows)
    rest = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    return contest(chain(layers, width), batches(4, rows, width), call_chain, lambda shares: shares, **rest)


def build_tokens(quick: bool, *, width: int, tokens: int) -> Contest:
    """Return the contest on a Llama's layer; what all layers together explain is compared, which EVA makes large."""
    model = llama(1, width // 2 if quick else width).eval()
    torch.manual_seed(1)
    data = [{"input_ids": torch.randint(0, 32, (4, tokens // 4))} for _ in range(4)]
    return contest(model, data, lambda model, batch: model(**batch), lambda shares: shares.sum(0, keepdim=True))


@measure("calibration", "EVA: from batches to directions and ranks")
def calibration() -> list[Case]:
    """`get_eva_state_dict`, rank 16, four batches, default options, on linears one after the other, which all have
    inputs of their own, and on a Llama's layer with random tokens. Both explain the same variance of the inputs, to
    2 %. peft hashes every number of the first batch and decomposes every batch, round and round, until no direction
    moves (13 forwards of the wide linears, 100 of the Llama); lorica adds up second moments in one round of 4."""
    shapes = itertools.product((4,), ((256, 512), (1024, 2048)))
    cases = [
        Case(f"{layers} layers of width {width}, {rows} rows", partial(build, layers=layers, width=width, rows=rows))
        for layers, (width, rows) in shapes
    ]
    return [*cases, Case("a Llama's layer of width 128, 256 tokens", partial(build_tokens, width=128, tokens=256))]
