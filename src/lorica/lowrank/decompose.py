"""Singular value decompositions: of a product through its small core, and of a matrix that is given whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Devices that have no float64.
_NARROW = ("mps", "neuron", "xla")


class Svd(NamedTuple):
    """``U·diag(S)·V``, the values falling; the largest entry of every column of U is positive.

    Attributes:
        u: ``[…, out, k]``, orthonormal columns.
        s: ``[…, k]``.
        v: ``[…, k, in]``, orthonormal rows.
    """

    u: Tensor
    s: Tensor
    v: Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return a factor in the precision that low-rank algebra is done in: float64 where the device has it."""
    return tensor.to(torch.float32 if tensor.device.type in _NARROW else torch.float64)


def svd_of_product(left: Tensor, right: Tensor, *, driver: str | None = None) -> Svd:
    """Return the exact decomposition of ``left · right``, of which no ``out × in`` matrix is formed.

    With ``left = Q R`` and ``rightᵀ = P T`` it is that of the core ``R Tᵀ``, ``R × R`` numbers, between Q and P: in all
    some ``2·(out + in)·R²`` operations, in place of ``out·in·min(out, in)``.

    Args:
        left: ``[…, out, R]``.
        right: ``[…, R, in]``.
        driver: for ``torch.linalg.svd``, on CUDA.

    Returns:
        As many values as the core has: ``min(out, in, R)`` at most.
    """
    q_OR, r_RR = torch.linalg.qr(left)
    p_IR, t_RR = torch.linalg.qr(right.mT)
    u, s, v = torch.linalg.svd(r_RR @ t_RR.mT, full_matrices=False, driver=driver)
    return _signed(Svd(q_OR @ u, s, v @ p_IR.mT))


def exact_svd(matrix: Tensor, *, driver: str | None = None) -> Svd:
    """Return the decomposition of a matrix ``[…, out, in]`` that is given whole, in its own precision."""
    return _signed(Svd(*torch.linalg.svd(matrix, full_matrices=False, driver=driver)))


def cut(found: Svd, rank: int) -> Svd:
    """Return the first ``rank`` values and vectors: the nearest matrix of that rank (Eckart and Young)."""
    return Svd(found.u[..., :rank], found.s[..., :rank], found.v[..., :rank, :])


def signs(u: Tensor) -> Tensor:
    """Return the sign, 1 or -1, of the largest entry of every column: ``[…, k]`` for ``[…, out, k]``.

    A pair of singular vectors is known up to its sign, which no two routines choose alike.
    """
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True)).squeeze(-2)
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def _signed(found: Svd) -> Svd:
    sign = signs(found.u)
    return Svd(found.u * sign.unsqueeze(-2), found.s, found.v * sign.unsqueeze(-1))


def rank_of_energy(s: Tensor, energy: float, total: float | None = None) -> int:
    """Return the least rank whose squared values add up to the share ``energy`` of ``total``; at least 1.

    Args:
        s: falling values ``[…, k]``; of a stack, the rank that serves all of it.
        energy: above 0, up to 1.
        total: the squares of all values, where ``s`` has only the first of them; all of ``s`` count where even they do
            not reach the share.
    """
    squares = s.double().square().reshape(-1, s.shape[-1])
    whole = squares.sum(-1) if total is None else torch.full_like(squares[:, 0], total)
    short = squares.cumsum(-1) < (energy * whole).unsqueeze(-1)
    return min(int(short.sum(-1).max()) + 1, s.shape[-1])
