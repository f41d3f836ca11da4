"""Starts that come from data: EVA's directions and ranks."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import LIBRARIES, chain
from benchmarks.suite import LORICA, PEFT, Case, Contest, measure
from benchmarks.timing import Task

#: By how much (relative) the variance explained may differ: PEFT's decomposition is a sketch.
TOLERANCE = 2e-2


def batches(count: int, rows: int, width: int) -> list[Tensor]:
    """Return rows whose variances fall, in a turned basis: their leading directions settle."""
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(width, width)).Q
    spread = 0.9 ** torch.arange(width).clamp(max=60)
    return [(torch.randn(rows, width) * spread) @ turn for _ in range(count)]


def covariances(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """Return the covariance of each linear's inputs, dense."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(name, []).append(args[0])

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(partial(note, name)) for name, module in linears]
    with torch.no_grad():
        for x in data:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cov(torch.cat(parts).T) for name, parts in seen.items()}


def build(quick: bool, *, layers: int, width: int, rows: int) -> Contest:
    """Return the contest of ``get_eva_state_dict``; the result is the share of each layer's variance in its A."""
    width, rows = (width // 4, rows // 4) if quick else (width, rows)
    model, data = chain(layers, width), batches(4, rows, width)
    wanted = covariances(model, data)

    def task(side: str) -> Task:
        library = LIBRARIES[side]
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        options = library.EvaConfig()
        config = library.LoraConfig(r=16, target_modules=names, init_lora_weights="eva", eva_config=options)

        def run() -> Tensor:
            found = library.get_eva_state_dict(
                model,
                data,
                config,
                forward_fn=lambda model, x: model(x),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )
            shares = [(a.float() @ wanted[name] * a.float()).sum() / wanted[name].trace() for name, a in found.items()]
            return torch.stack(shares)

        return Task(run)

    return Contest({side: task(side) for side in (PEFT, LORICA)}, rounds=6, tolerance=TOLERANCE)


@measure("calibration", "EVA: from batches to directions and ranks")
def calibration() -> list[Case]:
    """`get_eva_state_dict`, rank 16, four batches, default options, on linears one after the other, which all have
    inputs of their own. Both explain the same variance of the inputs, to 2 %. peft hashes every number of the first
    batch and decomposes every batch, round and round; lorica adds up second moments in one round. What is left of its
    time is mostly the forwards."""
    shapes = itertools.product((4,), ((256, 512), (1024, 2048)))
    return [
        Case(f"{layers} layers of width {width}, {rows} rows", partial(build, layers=layers, width=width, rows=rows))
        for layers, (width, rows) in shapes
    ]
