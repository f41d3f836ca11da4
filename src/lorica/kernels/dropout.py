"""Dropout masks that are drawn again rather than kept.

A mask is a function of a seed, and the seed is one draw from torch's default generator, so that activation
checkpointing draws the same one again. Each element is a random byte, compared with 256·p. What 256·p has behind the
point is a matter of chance for each row, so that every element is dropped with the probability p exactly; a byte for an
element takes a fifth of the time of a Bernoulli draw on a CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_BYTES = 8  # of a random number


class Dropped(NamedTuple):
    """One use of dropout.

    Attributes:
        p: the probability with which an element is dropped.
        seed: of the mask.
    """

    p: float
    seed: int


def draw_seed() -> int:
    """Return a seed: one draw from torch's default generator, on the CPU whatever the device."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64))


def keep_mask(x: Tensor, dropped: Dropped) -> Tensor:
    """Return which elements of ``x`` are kept, as booleans.

    Args:
        x: of any shape; only shape and device matter.
        dropped: probability and seed.
    """
    shape = x.shape
    columns = shape[-1] if shape else 1
    rows = x.numel() // max(1, columns)
    generator = torch.Generator(x.device).manual_seed(dropped.seed)
    words = torch.empty(-(-x.numel() // _BYTES), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    bytes_TI = words.view(torch.uint8)[: x.numel()].view(rows, columns)
    part, whole = math.modf(dropped.p * 256)
    if whole >= 256:
        return torch.zeros(shape, dtype=torch.bool, device=x.device)
    if part == 0:
        return (bytes_TI >= int(whole)).view(shape)
    chance_T1 = torch.rand(rows, 1, generator=generator, device=x.device)
    least_T1 = (chance_T1 < part).to(torch.uint8).add_(int(whole))
    return (bytes_TI >= least_T1).view(shape)


def scale_of(p: float) -> float:
    """Return what the kept elements are multiplied with, so that the mean stays: ``1 / (1 - p)``."""
    return 1 / (1 - p) if p < 1 else 0.0
