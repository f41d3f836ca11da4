"""One autograd function for several linear layers that share their input: it is read once for all of them.

::

    h = x [A₁; A₂; …]ᵀ            y = x Wᵀ + b,  then y += s·h Bᵀ in place        for each layer, with its columns of h
    G = [s·g₁ B₁, s·g₂ B₂, …]     dA = Gᵀ x      dx = Σ g W,  then dx += G [A₁; A₂; …] in place

Kept for backward are ``x`` and ``h``. Masks of dropout, one for each layer, are drawn again from their seeds. A second
derivative is that of the plain form.
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
Drops = Sequence[Dropped | None]


def fits(x: Tensor, items: Sequence[Projection]) -> bool:
    """What is differentiated is differentiated eagerly and in reverse."""
    return in_reverse()


def projections(x: Tensor, items: Sequence[Projection]) -> Sequence[Tensor]:
    """See :func:`lorica.kernels.plain.projections`."""
    weights, biases, a, b, scalings, drops = zip(*items, strict=True)
    outputs: Sequence[Tensor] = _Projections.apply(x, scalings, drops, *weights, *biases, *a, *b)  # type: ignore[no-untyped-call]
    return outputs


def dropping(x: Tensor, item: Projection) -> Tensor:
    """One layer with dropout, as a group of one."""
    return projections(x, (item,))[0]


class _Projections(torch.autograd.Function):
    """Gets ``x``, what is no tensor, and then the weights, biases, A's and B's, as many of each as there are layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], drops: Drops, *tensors: Any) -> tuple[Tensor, ...]:
        n, dtype = len(scalings), x.dtype
        weights, biases, a, b = (tensors[i * n : (i + 1) * n] for i in range(4))
        x_TI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        h_TR = _hidden(x_TI, a, drops)
        outputs = []
        columns = _columns(h_TR, [len(each) for each in a])
        for weight, bias, h, b_OR, alpha in zip(weights, biases, columns, b, _scales(scalings, drops), strict=True):
            y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            (y if y.dim() == 2 else y.view(-1, y.shape[-1])).addmm_(h, b_OR.to(dtype).t(), alpha=alpha)
            outputs.append(y)
        needs = ctx.needs_input_grad[3 + 2 * n :]
        ctx.save_for_backward(x if any(needs[:n]) else None, h_TR if any(needs[n:]) else None, *tensors)
        ctx.scalings, ctx.drops, ctx.shape = scalings, drops, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _differentiable(ctx, gradients)
        x, h_TR, *tensors = ctx.saved_tensors
        needs, n = ctx.needs_input_grad, len(ctx.scalings)
        if all(g is None for g in gradients):
            return (None,) * len(needs)
        weights, _, a, b = (tensors[i * n : (i + 1) * n] for i in range(4))
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in gradients]
        scales = _scales(ctx.scalings, ctx.drops)
        G_TR = _through_b(flat, b, scales)
        das = _grads_a(G_TR, x, a, ctx.drops, needs[3 + 2 * n : 3 + 3 * n])
        dbs = _grads_b(h_TR, flat, b, scales, needs[3 + 3 * n :])
        dx = _grad_x(flat, G_TR, weights, a, ctx.drops).view(ctx.shape) if needs[0] else None
        return (dx, None, None, *[None] * (2 * n), *das, *dbs)


def _scales(scalings: Sequence[float], drops: Drops) -> list[float]:
    return [s if drop is None else s * scale_of(drop.p) for s, drop in zip(scalings, drops, strict=True)]


def _columns(matrix: Tensor, widths: list[int]) -> Sequence[Tensor]:
    return torch.functional.split(matrix, widths, 1)


def _stacked(a: Tensors, dtype: torch.dtype) -> Tensor:
    """Return the A's one below the other, ``[R, in]``, cast and copied in one pass."""
    if len(a) == 1:
        return a[0].to(dtype)
    return torch.cat(tuple(a), out=a[0].new_empty((sum(len(each) for each in a), a[0].shape[1]), dtype=dtype))


def _hidden(x_TI: Tensor, a: Tensors, drops: Drops) -> Tensor:
    """Return ``[x A₁ᵀ, x A₂ᵀ, …]``, ``[T, R]``; dropout's scale is in :func:`_scales`."""
    if not any(drops):
        return x_TI.mm(_stacked(a, x_TI.dtype).t())
    parts = [
        (x_TI if drop is None else x_TI * keep_mask(x_TI, drop)).mm(a_RI.to(x_TI.dtype).t())
        for a_RI, drop in zip(a, drops, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _through_b(flat: Sequence[Tensor | None], b: Tensors, scales: Sequence[float]) -> Tensor:
    """Return ``G``, ``[T, R]``; zeros where an output had no part in the loss."""
    some = next(g for g in flat if g is not None)
    G_TR = some.new_empty((len(some), sum(b_OR.shape[1] for b_OR in b)))
    for block, g_TO, b_OR, scale in zip(_columns(G_TR, [each.shape[1] for each in b]), flat, b, scales, strict=True):
        if g_TO is None:
            block.zero_()
        else:
            block.addmm_(g_TO, b_OR.to(g_TO.dtype), beta=0, alpha=scale)
    return G_TR


def _grads_a(G_TR: Tensor, x: Tensor | None, a: Tensors, drops: Drops, needs: Sequence[bool]) -> list[Tensor | None]:
    if x is None:
        return [None] * len(a)
    x_TI, ranks = x.reshape(-1, x.shape[-1]), [len(each) for each in a]
    if not any(drops):
        rows = [row.t() for row in _columns(G_TR.t().mm(x_TI).t(), ranks)]
        return [row.to(each.dtype) if need else None for row, each, need in zip(rows, a, needs, strict=True)]
    found: list[Tensor | None] = []
    for G, each, drop, need in zip(_columns(G_TR, ranks), a, drops, needs, strict=True):
        kept_TI = x_TI if drop is None or not need else x_TI * keep_mask(x_TI, drop)
        found.append(G.t().mm(kept_TI).to(each.dtype) if need else None)
    return found


def _grads_b(
    h_TR: Tensor | None, flat: Sequence[Tensor | None], b: Tensors, scales: Sequence[float], needs: Sequence[bool]
) -> list[Tensor | None]:
    if h_TR is None:
        return [None] * len(b)
    columns = _columns(h_TR, [each.shape[1] for each in b])
    return [
        grad_b(h, g_TO, scale, each.dtype) if need and g_TO is not None else None
        for h, g_TO, each, scale, need in zip(columns, flat, b, scales, needs, strict=True)
    ]


def _grad_x(flat: Sequence[Tensor | None], G_TR: Tensor, weights: Tensors, a: Tensors, drops: Drops) -> Tensor:
    dx: Tensor | None = None
    for g_TO, weight in zip(flat, weights, strict=True):
        if g_TO is not None:
            weight = weight.to(g_TO.dtype)
            dx = g_TO.mm(weight) if dx is None else dx.addmm_(g_TO, weight)
    assert dx is not None
    if not any(drops):
        return dx.addmm_(G_TR, _stacked(a, dx.dtype))
    for G, each, drop in zip(_columns(G_TR, [len(each) for each in a]), a, drops, strict=True):
        part = G.mm(each.to(dx.dtype))
        dx = dx.add_(part) if drop is None else dx.addcmul_(part, keep_mask(part, drop))
    return dx


def _differentiable(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, _, *tensors = ctx.saved_tensors
    n = len(ctx.scalings)
    groups = [tensors[i * n : (i + 1) * n] for i in range(4)]
    items = [Projection(*each) for each in zip(*groups, ctx.scalings, ctx.drops, strict=True)]
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
    dx, *grads = differentiable(lambda: plain.projections(x, items), (x, *tensors), needs, gradients)
    return (dx, None, None, *grads)
