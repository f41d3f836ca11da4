"""What the kernels of linear layers work on: weight and factors of one layer, in plain tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lorica.kernels.dropout import Dropped


class Projection(NamedTuple):
    """One linear layer with one low-rank delta: ``y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ``.

    Attributes:
        weight: ``[out, in]``, frozen. Like all the others it follows the dtype of ``x``, and is not kept in it.
        bias: ``[out]``, frozen, or None.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: ``s``.
        dropped: the dropout before A; None: none.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float
    dropped: Dropped | None = None
