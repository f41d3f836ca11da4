"""A step of the optimiser over the factors of many linears."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.suite import LORICA, PEFT, Case, Contest, measure
from lorica.bench.timing import Task
from lorica.optim import AdamW

FUSED = "torch, fused"
COUNTS = ("kernels", "bytes moved", "peak bytes")
RANK, LAYERS = 16, 64


def factors(width: int) -> list[nn.Parameter]:
    """Return A and B of the 448 linears of 64 Llama layers, with a gradient each."""
    inner, narrow = width * 11 // 4, width // 2
    shapes = [(width, width), (narrow, width), (narrow, width), (width, width)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    torch.manual_seed(0)
    found = []
    for out_features, in_features in shapes * LAYERS:
        found += [nn.Parameter(torch.randn(RANK, in_features)), nn.Parameter(torch.randn(out_features, RANK))]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def build(quick: bool, *, width: int) -> Contest:
    """Return the contest of one AdamW step."""
    width = width // 4 if quick else width
    ways: dict[str, Any] = {
        PEFT: partial(torch.optim.AdamW, foreach=False, fused=False),
        FUSED: partial(torch.optim.AdamW, fused=True),
        LORICA: AdamW,
    }
    optimisers = {side: make(factors(width), lr=1e-6) for side, make in ways.items()}
    tasks = {side: Task(optimiser.step) for side, optimiser in optimisers.items()}
    return Contest(tasks, rounds=6 if quick else 30, counts=COUNTS)


@measure("optimiser", "A step of AdamW over 896 factors", sides=(PEFT, FUSED, LORICA))
def optimiser() -> list[Case]:
    """Rank 16 on the 448 linears of 64 Llama layers, fp32. PEFT has no AdamW of its own: its column is torch's, in a
    loop over the parameters (`foreach` and `fused` off). lorica's is bit for bit torch's fused one, with lists that are
    made once and one count of steps. The wider the layers are, the more is the arithmetic itself, which has 28 bytes of
    traffic for each number of the factors on every side."""
    return [Case(f"448 linears of width {width}", partial(build, width=width)) for width in (128, 512)]
