"""Every op as it is written on paper: differentiable any number of times, traceable, the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels.dropout import keep_mask, scale_of
from lorica.kernels.projection import Projection


def projection(x: Tensor, item: Projection) -> Tensor:
    """Return ``x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ``, ``[…, out]``.

    Args:
        x: ``[…, in]``.
        item: the layer.
    """
    weight, bias, a_RI, b_OR = (None if each is None else each.to(x.dtype) for each in item[:4])
    assert weight is not None
    assert a_RI is not None
    assert b_OR is not None
    y = F.linear(x, weight, bias)
    if item.dropped is not None:
        x = x * keep_mask(x, item.dropped) * scale_of(item.dropped.p)
    h_TR = F.linear(x.reshape(-1, x.shape[-1]), a_RI)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h_TR, b_OR.t(), alpha=item.scaling).view(y.shape)


def projections(x: Tensor, items: Sequence[Projection]) -> Sequence[Tensor]:
    """Return the same of each of several layers that share their input."""
    return [projection(x, item) for item in items]
