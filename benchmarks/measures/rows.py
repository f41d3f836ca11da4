"""Batches whose rows have different adapters."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

import lorica
from benchmarks.measures.training import TOLERANCE
from benchmarks.models import LIBRARIES, config, llama
from benchmarks.suite import FROZEN, LORICA, PEFT, Case, Contest, measure, quiet
from lorica.bench.timing import Task


def build(
    quick: bool, *, rows: int, adapters: int, tokens: int, width: int = 256, layers: int = 4, kept: bool = False
) -> Contest:
    """Return the contest of a forward of a batch in which each row has one of several adapters.

    Args:
        quick: whether it is a quick run: a smaller model.
        rows: of the batch.
        adapters: row ``i`` has adapter ``i mod adapters``.
        tokens: of each row.
        width: of the model.
        layers: of the model.
        kept: whether forwards follow one another as in ``generate``, whose steps share what is made for the rows.
    """
    base = llama(2 if quick else layers, width)
    names = [f"a{row % adapters}" for row in range(rows)]
    models = {side: _adapted(side, base, adapters) for side in (PEFT, LORICA)}
    models[LORICA].load_state_dict(models[PEFT].state_dict())  # the names are the same
    x = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(1))
    block = lorica.route_rows(models[LORICA], names)
    if kept:
        block.__enter__()
    tasks = {side: _forward(models[side], x, None if kept and side == LORICA else names) for side in models}
    tasks[FROZEN] = _forward(base.eval(), x, None)
    return Contest(
        tasks={side: tasks[side] for side in (FROZEN, PEFT, LORICA)},
        rounds=12 if quick else 60,
        counts=("FLOPs", "kernels", "bytes moved", "peak bytes"),
        models={FROZEN: base, **models},
        tolerance=TOLERANCE[torch.float32],
        close=(lambda: block.__exit__(None, None, None)) if kept else (lambda: None),
    )


def _adapted(side: str, base: nn.Module, adapters: int) -> nn.Module:
    fields = {"r": 8, "init_lora_weights": False}
    with quiet():
        model: nn.Module = LIBRARIES[side].get_peft_model(copy.deepcopy(base), config(side, **fields), "a0")
        for index in range(1, adapters):
            model.add_adapter(f"a{index}", config(side, **fields))  # type: ignore[operator]
    return model.eval()


def _forward(model: nn.Module, x: Tensor, names: list[str] | None) -> Task:
    arguments = {} if names is None else {"adapter_names": names}

    @torch.no_grad()
    def run() -> Tensor:
        y: Tensor = model(inputs_embeds=x, use_cache=False, **arguments).last_hidden_state
        return y

    return Task(run)


@measure("rows", "Batches of several adapters: forward without autograd")
def rows() -> list[Case]:
    """Llama, 4 layers of width 256, rank 8 on every linear; row i has adapter i mod n. `generate`: the steps share the
    factors that are stacked for the rows once."""
    decode = partial(build, tokens=1)
    return [
        Case("decode, 64 rows of 64 adapters", partial(decode, rows=64, adapters=64)),
        Case("decode in generate, 64 rows of 64 adapters", partial(decode, rows=64, adapters=64, kept=True)),
        Case("decode, 64 rows of 4 adapters", partial(decode, rows=64, adapters=4)),
        Case("prompts of 64 tokens, 64 rows of 64 adapters", partial(build, rows=64, adapters=64, tokens=64)),
        Case("prompts of 64 tokens, 16 rows of 16 adapters", partial(build, rows=16, adapters=16, tokens=64)),
        Case("prompts of 64 tokens, 16 rows of 4 adapters", partial(build, rows=16, adapters=4, tokens=64)),
    ]
