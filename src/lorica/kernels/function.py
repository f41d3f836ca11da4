"""One autograd function for a linear layer with its low-rank part.

::

    h = x Aᵀ      y = x Wᵀ + b,  then y += s·h Bᵀ in place: no second matrix of the output's size
    G = s·g B     dA = Gᵀ x      dB = s·gᵀ h      dx = g W,  then dx += G A in place

Kept for backward are ``x`` (if A trains) and ``h`` (if B does); what had to follow the dtype of ``x`` is cast again. A
second derivative is that of the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lorica.kernels import plain
from lorica.kernels.projection import Projection

#: From this many tokens on, ``hᵀ g`` and its transposed take less time than ``gᵀ h``, whose rows are short.
MANY_TOKENS = 128


def fits(x: Tensor, item: Projection) -> bool:
    """There is no dropout, and what is differentiated is differentiated eagerly and in reverse."""
    return item.dropped is None and in_reverse()


def in_reverse() -> bool:
    """Tell whether no transformation of functions, forward-mode derivative or tracer is at work."""
    traced = torch._C._get_tracing_state() is not None
    return not (traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def projection(x: Tensor, item: Projection) -> Tensor:
    """See :func:`lorica.kernels.plain.projection`."""
    weight, bias, a, b, scaling, _ = item
    y: Tensor = _Projection.apply(x, weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]
    return y


class _Projection(torch.autograd.Function):
    """Dispatching costs as much as arithmetic in small layers, so nothing is here that need not be."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        kept, dtype = (weight, bias, a, b), x.dtype
        if not (a.dtype == b.dtype == weight.dtype == dtype and (bias is None or bias.dtype == dtype)):
            weight, bias, a, b = (each if each is None else each.to(dtype) for each in kept)  # type: ignore[assignment]
        h_TR = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).mm(a.t())
        y = F.linear(x, weight, bias)
        (y if y.dim() == 2 else y.view(-1, y.shape[-1])).addmm_(h_TR, b.t(), alpha=scaling)
        _, _, _, train_a, train_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if train_a else None, h_TR if train_b else None, *kept)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(g.device.type):  # dtypes are those of forward
            with torch.autocast(g.device.type, enabled=False):
                return _Projection.backward(ctx, g)
        if torch.is_grad_enabled():
            return _differentiable(ctx, g)
        x, h_TR, weight, _, a_RI, b_OR = ctx.saved_tensors
        scaling, (train_x, _, _, train_a, train_b, _) = ctx.scaling, ctx.needs_input_grad
        kept, dtype = (a_RI, b_OR), g.dtype
        if not a_RI.dtype == b_OR.dtype == weight.dtype == dtype:
            weight, a_RI, b_OR = weight.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
        g_TO = g if g.dim() == 2 else g.reshape(-1, g.shape[-1])
        G_TR = g.new_empty((len(g_TO), len(a_RI))).addmm_(g_TO, b_OR, beta=0, alpha=scaling)
        dx = da = db = None
        if train_a:
            da = G_TR.t().mm(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
            da = da if kept[0].dtype == dtype else da.to(kept[0].dtype)
        if train_b:
            db = grad_b(h_TR, g_TO, scaling, kept[1].dtype)
        if train_x:
            dx = g_TO.mm(weight).addmm_(G_TR, a_RI)
            dx = dx if len(ctx.shape) == 2 else dx.view(ctx.shape)
        return dx, None, None, da, db, None


def grad_b(h_TR: Tensor, g_TO: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return ``s·gᵀ h``, ``[out, r]``."""
    T, r = h_TR.shape
    if T < MANY_TOKENS:
        grad = g_TO.new_empty((g_TO.shape[1], r)).addmm_(g_TO.t(), h_TR, beta=0, alpha=scaling)
    else:
        grad = g_TO.new_empty((r, g_TO.shape[1])).addmm_(h_TR.t(), g_TO, beta=0, alpha=scaling).t()
    return grad if grad.dtype == dtype else grad.to(dtype)


def _differentiable(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, _, weight, bias, a, b = ctx.saved_tensors

    def run(x: Any, weight: Any, bias: Any, a: Any, b: Any) -> list[Tensor]:
        return [plain.projection(x, Projection(weight, bias, a, b, ctx.scaling))]

    return (*differentiable(run, (x, weight, bias, a, b), ctx.needs_input_grad, [g]), None)


def differentiable(
    run: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return gradients that have a graph of their own: those of the plain form, made again from its inputs.

    Args:
        run: the plain form, of the inputs.
        inputs: what it is differentiated by; the first is the layer's input, None where it was not kept.
        needs: by which of them.
        gradients: of its outputs.

    Raises:
        RuntimeError: the layer's input was not kept.
    """
    if inputs[0] is None:
        raise RuntimeError(
            "a second derivative needs the layer's input, which is not kept where A does not train; run the forward "
            "inside `with lorica.kernels.using('plain'):`"
        )
    wanted = [i for i, need in zip(range(len(inputs)), needs, strict=False) if need]
    grads: list[Tensor | None] = [None] * len(inputs)
    with torch.enable_grad():
        # By views, which nothing else depends on: one input may have been made from another (shared factors).
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        pairs = [(y, g) for y, g in zip(run(*views), gradients, strict=True) if g is not None]
        if pairs:
            outputs, seeds = zip(*pairs, strict=True)
            chosen = [views[i] for i in wanted]
            found = torch.autograd.grad(outputs, chosen, seeds, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad
    return grads
