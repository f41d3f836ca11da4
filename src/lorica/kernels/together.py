"""One autograd function for several linear layers that share their input and their dropout.

::

    h = x Aᵀ                      y = x Wᵀ + b,  then y += s·h Bᵀ in place       for each layer
    G = [s·g₁ B₁, s·g₂ B₂, …]     dA = Gᵀ x      dx = Σ g W,  then dx += G [A₁; A₂; …] in place

The gradients of ``x`` are summed where they are made. Forward does for each layer what it would do for it alone, so
that a layer's output does not depend on its company. Kept for backward are ``x`` and each ``h``. The mask of dropout,
one for all, is drawn again from its seed. A second derivative is that of the plain form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels import plain
from lorica.kernels.dropout import Dropped, keep_mask, scale_of
from lorica.kernels.function import differentiable, grad_b, in_reverse
from lorica.kernels.projection import Projection

Tensors = Sequence[Tensor]


def fits(x: Tensor, items: Sequence[Projection]) -> bool:
    """What is differentiated is differentiated eagerly and in reverse; there is one mask for all."""
    return in_reverse() and all(item.dropped == items[0].dropped for item in items)


def projections(x: Tensor, items: Sequence[Projection]) -> Sequence[Tensor]:
    """See :func:`lorica.kernels.plain.projections`."""
    weights, biases, a, b, scalings, drops = zip(*items, strict=True)
    outputs: Sequence[Tensor] = _Projections.apply(x, scalings, drops[0], *weights, *biases, *a, *b)  # type: ignore[no-untyped-call]
    return outputs


def fits_one(x: Tensor, item: Projection) -> bool:
    """See :func:`fits`."""
    return fits(x, (item,))


def dropping(x: Tensor, item: Projection) -> Tensor:
    """One layer with dropout, as a group of one."""
    return projections(x, (item,))[0]


class _Projections(torch.autograd.Function):
    """Gets ``x``, what is no tensor, and then the weights, biases, A's and B's, as many of each as there are layers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: tuple[float, ...], drop: Dropped | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        n, dtype = len(scalings), x.dtype
        weights, biases, a, b = (tensors[i * n : (i + 1) * n] for i in range(4))
        x_TI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        # What multiplies h and G: the scale of what dropout keeps goes into the adapter's.
        scales = scalings if drop is None else tuple(s * scale_of(drop.p) for s in scalings)
        dropped_TI = x_TI if drop is None else x_TI * keep_mask(x_TI, drop)
        outputs, hidden = [], list[Tensor]()
        for weight, bias, a_RI, b_OR, scale in zip(weights, biases, a, b, scales, strict=True):
            h_TR = dropped_TI.mm(a_RI.to(dtype).t())
            y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            (y if y.dim() == 2 else y.view(-1, y.shape[-1])).addmm_(h_TR, b_OR.to(dtype).t(), alpha=scale)
            outputs.append(y)
            hidden.append(h_TR)
        needs = ctx.needs_input_grad[3 + 2 * n :]
        kept = (h if need else None for h, need in zip(hidden, needs[n:], strict=True))
        ctx.save_for_backward(x if any(needs[:n]) else None, *kept, *tensors)
        ctx.scalings, ctx.scales, ctx.drop, ctx.shape = scalings, scales, drop, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        device = next((g.device.type for g in gradients if g is not None), "cpu")
        if torch.is_autocast_enabled(device):  # dtypes are those of forward
            with torch.autocast(device, enabled=False):
                return _Projections.backward(ctx, *gradients)
        if torch.is_grad_enabled():
            return _differentiable(ctx, gradients)
        x, *tensors = ctx.saved_tensors
        needs, n = ctx.needs_input_grad, len(ctx.scales)
        grads: list[Tensor | None] = [None] * len(needs)
        # An output that had no part in the loss changes nothing, not even the order of a sum.
        live = [i for i, g in enumerate(gradients) if g is not None]
        if not live:
            return tuple(grads)
        hidden, weights, _, a, b = ([tensors[k * n + i] for i in live] for k in range(5))
        flat = [g.reshape(-1, g.shape[-1]) for g in gradients if g is not None]
        scales = [ctx.scales[i] for i in live]
        G_TR = through_b(flat, b, scales)
        x_TI = None if x is None else x.reshape(-1, x.shape[-1])
        mask = None if ctx.drop is None or x_TI is None else keep_mask(x_TI, ctx.drop)
        das = [None] * len(live) if x_TI is None else grads_a(G_TR, x_TI, a, mask)
        for i, da, h_TR, g_TO, b_OR in zip(live, das, hidden, flat, b, strict=True):
            grads[3 + 2 * n + i] = da if needs[3 + 2 * n + i] else None
            grads[3 + 3 * n + i] = None if h_TR is None else grad_b(h_TR, g_TO, ctx.scales[i], b_OR.dtype)
        if needs[0]:
            grads[0] = grad_x(flat, G_TR, weights, a, ctx.drop, mask).view(ctx.shape)
        return tuple(grads)


def through_b(flat: Tensors, b: Tensors, scales: Sequence[float]) -> Tensor:
    """Return ``G = [s·g₁ B₁, s·g₂ B₂, …]``, ``[T, R]``, for gradients ``[T, out]``."""
    G_TR = flat[0].new_empty((len(flat[0]), sum(b_OR.shape[1] for b_OR in b)))
    for block, g_TO, b_OR, scale in zip(_columns(G_TR, b), flat, b, scales, strict=True):
        block.addmm_(g_TO, b_OR.to(g_TO.dtype), beta=0, alpha=scale)
    return G_TR


def _columns(matrix: Tensor, b: Tensors) -> Sequence[Tensor]:
    return torch.functional.split(matrix, [b_OR.shape[1] for b_OR in b], 1)


def grads_a(G_TR: Tensor, x_TI: Tensor, a: Tensors, mask: Tensor | None) -> Sequence[Tensor]:
    """Return the gradients of the A's: ``Gᵀ x``, where ``mask`` let ``x`` through."""
    grads = G_TR.t().mm(x_TI if mask is None else x_TI * mask)
    rows = torch.functional.split(grads, [len(each) for each in a])
    return [row.to(each.dtype) for row, each in zip(rows, a, strict=True)]


def grad_x(
    flat: Tensors, G_TR: Tensor, weights: Tensors, a: Tensors, drop: Dropped | None, mask: Tensor | None
) -> Tensor:
    """Return the gradient of ``x``, ``[T, in]``: ``Σ g W + G [A₁; A₂; …]``.

    ``mask`` is that of ``drop`` where it was drawn again already; None: it is drawn.
    """
    dtype = flat[0].dtype
    dx = flat[0].mm(weights[0].to(dtype))
    for g_TO, weight in zip(flat[1:], weights[1:], strict=True):
        dx.addmm_(g_TO, weight.to(dtype))
    a_RI = _stacked(a, dtype)
    if drop is None:
        return dx.addmm_(G_TR, a_RI)
    part = G_TR.mm(a_RI)
    return dx.addcmul_(part, keep_mask(part, drop) if mask is None else mask)


def _stacked(a: Tensors, dtype: torch.dtype) -> Tensor:
    """Return the A's one below the other, ``[R, in]``, cast and copied in one pass."""
    if len(a) == 1:
        return a[0].to(dtype)
    return torch.cat(tuple(a), out=a[0].new_empty((sum(len(each) for each in a), a[0].shape[1]), dtype=dtype))


def _differentiable(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    n = len(ctx.scalings)
    x, *tensors = ctx.saved_tensors

    def run(x: Any, *tensors: Any) -> Sequence[Tensor]:
        groups = [tensors[i * n : (i + 1) * n] for i in range(4)]
        items = [Projection(*each) for each in zip(*groups, ctx.scalings, [ctx.drop] * n, strict=True)]
        return plain.projections(x, items)

    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
    dx, *grads = differentiable(run, (x, *tensors[n:]), needs, gradients)
    return (dx, None, None, *grads)
