"""Sums of products ``L·R`` as one product of stacked factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pair(NamedTuple):
    """A matrix ``left · right``.

    Attributes:
        left: ``[…, out, r]``.
        right: ``[…, r, in]``.
    """

    left: Tensor
    right: Tensor


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Return ``Σ w·left·right`` as one pair, whose rank is the sum of the ranks; the weights go into the right side."""
    left = torch.cat([pair.left for pair in pairs], -1)
    right = torch.cat([pair.right * weight for pair, weight in zip(pairs, weights, strict=True)], -2)
    return Pair(left, right)


def padded(pair: Pair, rank: int) -> Pair:
    """Return the same matrix as a pair of a larger rank, of which the rest is zero on both sides.

    Raises:
        ValueError: the pair has a larger rank already.
    """
    more = rank - pair.left.shape[-1]
    if more < 0:
        raise ValueError(f"a pair of rank {pair.left.shape[-1]} is none of rank {rank}")
    return Pair(F.pad(pair.left, (0, more)), F.pad(pair.right, (0, 0, 0, more))) if more else pair
