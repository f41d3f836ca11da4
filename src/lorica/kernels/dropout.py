"""Dropout masks that are drawn again rather than kept.

A mask is a function of a seed, and the seed is one draw from torch's default generator, so that activation
checkpointing draws the same one again. Each element is a random byte, compared with 256·p. Where that is no integer,
the seed says whether the mask goes by the one below or above, so that every element is dropped with the probability p;
a byte for an element takes a fifth of the time of a Bernoulli draw on a CPU.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

_BYTES = 8  # of a random number
MIX = 0x9E3779B97F4A7C15  # 2⁶⁴ / φ, whose multiples are far apart


class Dropped(NamedTuple):
    """One use of dropout.

    Attributes:
        p: the probability with which an element is dropped.
        seed: of the mask.
    """

    p: float
    seed: int


def draw_seed() -> int:
    """Take one draw from torch's default generator, on the CPU, so that ``torch.manual_seed`` governs what follows."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64))


def keep_mask(x: Tensor, dropped: Dropped) -> Tensor:
    """Return which elements of ``x`` are kept, as booleans.

    Args:
        x: of any shape; only shape and device matter.
        dropped: probability and seed.
    """
    least = _least_kept(dropped)
    if least > 255:
        return torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    rows, size = (x.shape[:-1], x.shape[-1]) if x.dim() else ((), 1)
    even = size % _BYTES == 0
    shape = (*rows, size // _BYTES) if even else (-(-x.numel() // _BYTES),)
    words = torch.empty(shape, dtype=torch.int64, device=x.device)
    drawn = words.random_(-(2**63), None, generator=_generator(x.device, dropped.seed)).view(torch.uint8)
    return (drawn if even else drawn[: x.numel()].view(x.shape)) >= _BYTE[least]


#: The bytes as tensors, which are compared with in half the time that numbers are.
_BYTE = torch.arange(256, dtype=torch.uint8, device="cpu").unbind()


class _Generators(threading.local):
    """This thread's generators: seeding one anew takes half as long as making one."""

    def __init__(self) -> None:
        self.of: dict[torch.device, torch.Generator] = {}


_generators = _Generators()


def _generator(device: torch.device, seed: int) -> torch.Generator:
    generator = _generators.of.get(device)
    if generator is None:
        generator = _generators.of[device] = torch.Generator(device)
    return generator.manual_seed(seed)


def _least_kept(dropped: Dropped) -> int:
    """Return the least byte that is kept."""
    part, whole = math.modf(dropped.p * 256)
    chance = (dropped.seed * MIX >> 32) % 2**30 / 2**30
    return int(whole) + (chance < part)


def scale_of(p: float) -> float:
    """Return what the kept elements are multiplied with, so that the mean stays: ``1 / (1 - p)``."""
    return 1 / (1 - p) if p < 1 else 0.0
