"""Starts made of base weights: the decompositions."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from benchmarks.models import adapt
from benchmarks.suite import LORICA, PEFT, Case, Contest, measure
from lorica.bench.timing import Task


def build_start(quick: bool, *, width: int, theirs: str, ours: str) -> Contest:
    """Return the contest of putting an adapter in that starts from the base weight."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width // 4 if quick else width, width // 4 if quick else width, bias=False))

    def task(side: str, init: str) -> Task:
        fresh: list[nn.Module] = []

        def reset() -> None:
            fresh[:] = [copy.deepcopy(base)]

        return Task(lambda: adapt(side, fresh[0], target_modules=["0"], init_lora_weights=init), reset)

    return Contest({PEFT: task(PEFT, theirs), LORICA: task(LORICA, ours)}, rounds=3 if quick else 7)


@measure("starts", "Starting from the base weight")
def starts() -> list[Case]:
    """`get_peft_model` on one linear of width 1024, rank 16. `pissa` is the exact decomposition on both sides.
    `pissa_niter_4` iterates a sketch: lorica's keeps all its directions and is held to 1.003 times the least residual,
    peft's keeps the last ones and has no bound. For `olora` lorica decomposes the first 16 columns only."""
    pairs = {
        "pissa": ("pissa", "pissa"),
        "pissa, lorica: pissa_niter_4": ("pissa", "pissa_niter_4"),
        "pissa_niter_4": ("pissa_niter_4", "pissa_niter_4"),
        "olora": ("olora", "olora"),
    }
    return [
        Case(label, partial(build_start, width=1024, theirs=theirs, ours=ours))
        for label, (theirs, ours) in pairs.items()
    ]
