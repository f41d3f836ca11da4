"""Small inputs: torch's own nodes, recorded as they come, cost less than a function that is written in Python.

::

    y = x Wᵀ + b,  then y += s·(drop(x) Aᵀ) Bᵀ in place

Backward takes more kernels and two passes more over a matrix of the input's size than :mod:`lorica.kernels.function`,
and dropout keeps what it made of the input, with its mask. Where the input has few elements, that is less than what
calling Python from backward costs. A second derivative is the recorded operators' own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lorica.kernels.dropout import Dropped, keep_mask, scale_of
from lorica.kernels.function import in_reverse
from lorica.kernels.projection import Projection

#: Inputs with at least as many elements take a function. On a CPU recording still takes less time at four times as
#: many; but there what dropout keeps begins to count.
ELEMENTS = 2**13


def fits(x: Tensor, item: Projection) -> bool:
    """The input is small and on a CPU, and what is differentiated is differentiated eagerly and in reverse."""
    return in_reverse() and x.is_cpu and x.numel() < ELEMENTS


def fits_all(x: Tensor, items: Sequence[Projection]) -> bool:
    """See :func:`fits`."""
    return fits(x, items[0])


def projection(x: Tensor, item: Projection) -> Tensor:
    """See :func:`lorica.kernels.plain.projection`."""
    flat = x.dim() == 2
    x_TI = x if flat else x.reshape(-1, x.shape[-1])
    y_TO = _add(x_TI, x_TI if item.dropped is None else _drop(x_TI, item.dropped), item)
    return y_TO if flat else y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def projections(x: Tensor, items: Sequence[Projection]) -> Sequence[Tensor]:
    """See :func:`lorica.kernels.plain.projections`; a mask that several share is drawn once."""
    x_TI = x.reshape(-1, x.shape[-1])
    drops = {item.dropped for item in items}
    seen = {drop: x_TI if drop is None else _drop(x_TI, drop) for drop in drops}
    return [_add(x_TI, seen[item.dropped], item).view(*x.shape[:-1], len(item.weight)) for item in items]


def _drop(x_TI: Tensor, dropped: Dropped) -> Tensor:
    # In the input's dtype the mask is multiplied with in a third of the time, and that twice.
    return x_TI * keep_mask(x_TI, dropped).to(x_TI.dtype)


def _add(x_TI: Tensor, seen_TI: Tensor, item: Projection) -> Tensor:
    """Return a layer's output; ``seen_TI`` is the input as A sees it, but for the scale of what dropout keeps."""
    weight, bias, a_RI, b_OR, scale, dropped = item
    dtype = x_TI.dtype
    if not (a_RI.dtype == b_OR.dtype == weight.dtype == dtype and (bias is None or bias.dtype == dtype)):
        weight, a_RI, b_OR = weight.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    before = dropped is not None or math.frexp(scale)[0] == 0.5
    if dropped is not None:
        scale *= scale_of(dropped.p)
    y_TO = F.linear(x_TI, weight, bias)
    h_TR = F.linear(seen_TI, a_RI)
    if not before:
        return y_TO.addmm_(h_TR, b_OR.t(), alpha=scale)
    # As ``alpha`` of the product, backward would have the scale multiply two matrices, one of them as large as B. But
    # an evaluation gives the digits of a training forward, so without dropout only powers of two, which round nothing.
    return y_TO.addmm_(h_TR if scale == 1 else h_TR * scale, b_OR.t())
