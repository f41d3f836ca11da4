"""Without autograd: the delta is added in place to what the base product has just returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels.dropout import keep_mask, scale_of
from lorica.kernels.function import in_reverse
from lorica.kernels.projection import Projection


def fits(x: Tensor, *rest: Any) -> bool:
    """Nothing is recorded, and nothing follows the operators that cannot follow one that writes in place."""
    return not torch.is_grad_enabled() and in_reverse()


def projection(x: Tensor, item: Projection) -> Tensor:
    """See :func:`lorica.kernels.plain.projection`."""
    weight, bias, a_RI, b_OR, scaling, dropped = item
    dtype = x.dtype
    if not (a_RI.dtype == b_OR.dtype == weight.dtype == dtype and (bias is None or bias.dtype == dtype)):
        weight, a_RI, b_OR = weight.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # Flat from the start: each view costs as much as the arithmetic of one token.
    x_TI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y_TO = F.linear(x_TI, weight, bias)
    if dropped is not None:
        x_TI, scaling = x_TI * keep_mask(x_TI, dropped), scaling * scale_of(dropped.p)
    y_TO.addmm_(F.linear(x_TI, a_RI), b_OR.t(), alpha=scaling)
    return y_TO if x.dim() == 2 else y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def projections(x: Tensor, items: Sequence[Projection]) -> Sequence[Tensor]:
    """See :func:`lorica.kernels.plain.projections`."""
    return [projection(x, item) for item in items]
