"""One autograd function for a whole gated MLP: ``down(act(gate(x)) · up(x))``, its low-rank parts included.

::

    forward   gate, up = linears of x          z = act(gate)·up          y = down(z)
    backward  dz = g W_d + s·g B_d A_d         a = act(gate)             z = a·up, for A_d alone
              d_up = dz·a,  d_gate = act'(gate)·(dz·up), both in place   then gate's and up's own backward

Kept are ``x``, gate, up and the three ``h = x Aᵀ``. What autograd would keep besides, ``act(gate)``, the product, and
what dropout makes of it, are as large as gate and up; they are made again. A second derivative is that of the plain
form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels import inference, plain
from lorica.kernels.dropout import keep_mask, scale_of
from lorica.kernels.function import differentiable, grad_b, in_reverse
from lorica.kernels.projection import Projection
from lorica.kernels.together import grad_x, grads_a, through_b

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation, element by element.

    Attributes:
        run: x → act(x).
        backward: (gradient, x, out) → act'(x) times the gradient, written to ``out``.
    """

    run: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(F.gelu, approximate=approximate),
        lambda g, x, out: _aten.gelu_backward.grad_input(g, x, approximate=approximate, grad_input=out),
    )


#: Name → activation.
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, lambda g, x, out: _aten.silu_backward.grad_input(g, x, grad_input=out)),
    "gelu_tanh": _gelu("tanh"),
    "gelu": _gelu("none"),
    "relu": Activation(F.relu, lambda g, x, out: _aten.threshold_backward.grad_input(g, x, 0, grad_input=out)),
}


class Gated(NamedTuple):
    """A gated MLP in plain tensors.

    Attributes:
        into: gate and up, or one layer that has both in its rows. They share one mask of dropout, or have none.
        down: the layer behind them.
        activation: a key of :data:`ACTIVATIONS`.
        up_first: whether up comes before gate.
    """

    into: tuple[Projection, ...]
    down: Projection
    activation: str
    up_first: bool = False


def plain_mlp(x: Tensor, item: Gated) -> Tensor:
    """Return ``down(act(gate(x)) · up(x))``, ``[…, out]``.

    Args:
        x: ``[…, in]``.
        item: the block.
    """
    gate, up = _gate_up([plain.projection(x, each) for each in item.into], item.up_first)
    return plain.projection(ACTIVATIONS[item.activation].run(gate) * up, item.down)


def inference_mlp(x: Tensor, item: Gated) -> Tensor:
    """Without autograd: see :func:`plain_mlp`."""
    gate, up = _gate_up(inference.projections(x, item.into), item.up_first)
    return inference.projection(ACTIVATIONS[item.activation].run(gate).mul_(up), item.down)


def function_fits(x: Tensor, item: Gated) -> bool:
    """What is differentiated is differentiated eagerly and in reverse; gate and up have one mask."""
    return in_reverse() and all(each.dropped == item.into[0].dropped for each in item.into)


def function_mlp(x: Tensor, item: Gated) -> Tensor:
    """See :func:`plain_mlp`."""
    items = (*item.into, item.down)
    tensors = [tensor for each in items for tensor in each[:4]]
    y: Tensor = _Gated.apply(x, item, *tensors)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    """Gets ``x``, the block for what is no tensor, and then weight, bias, A and B of each layer, down's last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, item: Gated, *tensors: Any) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        drop = item.into[0].dropped
        seen = _dropped(x_TI, None if drop is None else keep_mask(x_TI, drop))
        wide, hidden = [], list[Tensor]()
        for each in item.into:
            y_TO, h_TR = _linear(x_TI, seen, each)
            wide.append(y_TO)
            hidden.append(h_TR)
        gate, up = _gate_up(wide, item.up_first)
        z_TH = ACTIVATIONS[item.activation].run(gate).mul_(up)
        drop = item.down.dropped
        y_TO, h_TR = _linear(z_TH, _dropped(z_TH, None if drop is None else keep_mask(z_TH, drop)), item.down)
        needs = ctx.needs_input_grad
        train_a, train_b = needs[4::4], needs[5::4]
        ctx.below = needs[0] or any(train_a[:-1]) or any(train_b[:-1])
        kept = [h if need else None for h, need in zip([*hidden, h_TR], train_b, strict=True)]
        wide = wide if ctx.below or train_a[-1] else [None] * len(wide)  # type: ignore[list-item]
        ctx.save_for_backward(x if any(train_a[:-1]) else None, *wide, *kept, *tensors)
        # The block without its tensors, which are kept where autograd sees them.
        ctx.settings = [(each.scaling, each.dropped) for each in (*item.into, item.down)]
        ctx.activation, ctx.up_first = item.activation, item.up_first
        ctx.shape, ctx.device = x.shape, x.device.type
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.is_autocast_enabled(ctx.device):  # dtypes are those of forward
            with torch.autocast(ctx.device, enabled=False):
                return _Gated.backward(ctx, g)
        n = len(ctx.settings)
        x, *rest = ctx.saved_tensors
        wide, hidden, tensors = rest[: n - 1], rest[n - 1 : 2 * n - 1], rest[2 * n - 1 :]
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, tensors, g)
        item = _item(ctx, tensors)
        grads: list[Tensor | None] = [None] * (2 + 4 * n)
        inner = _through_down(ctx, g.reshape(-1, g.shape[-1]), wide, hidden[-1], item, grads)
        if inner is not None:
            grads[0] = _through_into(ctx, inner, x, hidden[:-1], item, grads)
        return tuple(grads)


def _through_down(
    ctx: Any, g_TO: Tensor, wide: Sequence[Tensor], h_TR: Tensor | None, item: Gated, grads: list[Tensor | None]
) -> list[Tensor] | None:
    """Enter down's gradients, and return those of what gate and up gave; None where nobody needs them."""
    down, train_a = item.down, ctx.needs_input_grad[-2]
    G_TR = through_b([g_TO], [down.b], [_scale(down)])
    if h_TR is not None:
        grads[-1] = grad_b(h_TR, g_TO, _scale(down), down.b.dtype)
    if not (ctx.below or train_a):
        return None
    gate, up = _gate_up(wide, item.up_first)
    activation = ACTIVATIONS[item.activation]
    act = activation.run(gate)
    mask = None if down.dropped is None else keep_mask(act, down.dropped)
    if train_a:
        z_TH = act * up
        z_TH = z_TH if mask is None else z_TH.mul_(mask)
        grads[-2] = G_TR.t().mm(z_TH).to(down.a.dtype)
        del z_TH
    if not ctx.below:
        return None
    dz_TH = grad_x([g_TO], G_TR, [down.weight], [down.a], down.dropped, mask)
    if len(wide) == 2:
        d_up, d_gate = act, dz_TH  # in the place of what is not needed any more
        inner = [d_up, d_gate] if item.up_first else [d_gate, d_up]
    else:
        inner = [torch.empty_like(wide[0])]
        d_gate, d_up = _gate_up(inner, item.up_first)
    torch.mul(act, dz_TH, out=d_up)
    activation.backward(dz_TH.mul_(up), gate, d_gate)
    return inner


def _through_into(
    ctx: Any,
    inner: Sequence[Tensor],
    x: Tensor | None,
    hidden: Sequence[Tensor | None],
    item: Gated,
    grads: list[Tensor | None],
) -> Tensor | None:
    """Enter the gradients of gate and up, and return that of ``x``, if it needs one."""
    needs, drop = ctx.needs_input_grad, item.into[0].dropped
    weights, a, b = ([getattr(each, name) for each in item.into] for name in ("weight", "a", "b"))
    G_TR = through_b(inner, b, [_scale(each) for each in item.into])
    mask = None
    if x is not None:
        x_TI = x.reshape(-1, x.shape[-1])
        mask = None if drop is None else keep_mask(x_TI, drop)
        for i, da in enumerate(grads_a(G_TR, x_TI, a, mask)):
            grads[4 + 4 * i] = da if needs[4 + 4 * i] else None
    for i, (g_TO, h_TR, each) in enumerate(zip(inner, hidden, item.into, strict=True)):
        grads[5 + 4 * i] = None if h_TR is None else grad_b(h_TR, g_TO, _scale(each), b[i].dtype)
    return grad_x(inner, G_TR, weights, a, drop, mask).view(ctx.shape) if needs[0] else None


def _gate_up(wide: Sequence[Tensor], up_first: bool) -> tuple[Tensor, Tensor]:
    first, second = wide if len(wide) == 2 else wide[0].chunk(2, -1)
    return (second, first) if up_first else (first, second)


def _scale(item: Projection) -> float:
    """Return what multiplies ``h`` and ``G``: the scale of what dropout keeps goes into the adapter's."""
    return item.scaling if item.dropped is None else item.scaling * scale_of(item.dropped.p)


def _dropped(x_TI: Tensor, mask: Tensor | None) -> Tensor:
    return x_TI if mask is None else x_TI * mask


def _linear(x_TI: Tensor, seen: Tensor, item: Projection) -> tuple[Tensor, Tensor]:
    """Return the layer's output and ``h``; ``seen`` is the input as A sees it."""
    dtype, bias = x_TI.dtype, item.bias
    y_TO = F.linear(x_TI, item.weight.to(dtype), None if bias is None else bias.to(dtype))
    h_TR = seen.mm(item.a.to(dtype).t())
    return y_TO.addmm_(h_TR, item.b.to(dtype).t(), alpha=_scale(item)), h_TR


def _item(ctx: Any, tensors: Sequence[Any]) -> Gated:
    items = [
        Projection(*tensors[4 * i : 4 * i + 4], scaling, dropped)  # type: ignore[call-arg]
        for i, (scaling, dropped) in enumerate(ctx.settings)
    ]
    return Gated(tuple(items[:-1]), items[-1], ctx.activation, ctx.up_first)


def _differentiable(ctx: Any, x: Tensor | None, tensors: Sequence[Any], g: Tensor) -> tuple[Any, ...]:
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])

    def run(x: Tensor, *tensors: Any) -> list[Tensor]:
        return [plain_mlp(x, _item(ctx, tensors))]

    dx, *grads = differentiable(run, (x, *tensors), needs, [g])
    return (dx, None, *grads)
