"""One number for every output that multiplies it (DoRA's ``m / ‖W + s·B·A‖``), in one autograd function.

::

    y = gain·z + rest
    dz = gain·g        dgain = Σ g·z        drest = Σ g        sums over all but the outputs

Kept for backward is ``z``, if the gain trains. ``y`` would do, but it is its receiver's, who may write over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorica.kernels import function


def plain(z: Tensor, gain: Tensor, rest: Tensor | None) -> Tensor:
    """Return ``gain·z + rest`` in the dtype of ``z``, computed in the wider one: a gain of 1 leaves ``z`` bit for bit,
    and one that is near 1 is not rounded to it.

    Args:
        z: any shape.
        gain: of a shape that broadcasts to that of ``z``.
        rest: of the shape and the dtype of the gain; None: nothing.
    """
    return (z * gain if rest is None else torch.addcmul(rest, z, gain)).to(z.dtype)


def inference(z: Tensor, gain: Tensor, rest: Tensor | None) -> Tensor:
    """See :func:`plain`; without a second tensor in the wider dtype."""
    y = torch.empty_like(z)
    if rest is None:
        return torch.mul(z, gain, out=y)
    return torch.addcmul(rest, z, gain, out=y)


def fits(z: Tensor, gain: Tensor, rest: Tensor | None) -> bool:
    """What is differentiated is differentiated eagerly and in reverse."""
    return function.in_reverse()


def scaled(z: Tensor, gain: Tensor, rest: Tensor | None) -> Tensor:
    """See :func:`plain`."""
    y: Tensor = _Scaled.apply(z, gain, rest)  # type: ignore[no-untyped-call]
    return y


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, rest: Tensor | None) -> Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, gain)
        return inference(z, gain, rest)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, gain = ctx.saved_tensors
        need_z, need_gain, need_rest = ctx.needs_input_grad
        recorded = torch.is_grad_enabled()
        dz = dgain = drest = room = None
        if need_gain:
            room = g * z
            dgain = _per_output(room, gain)
        if need_rest:
            drest = _per_output(g, gain)
        if need_z:
            if recorded:
                dz = (g * gain).to(g.dtype)
            else:
                dz = torch.mul(g, gain, out=torch.empty_like(g) if room is None else room)
        return dz, dgain, drest


def _per_output(values: Tensor, gain: Tensor) -> Tensor:
    """Sum over all dimensions that the gain does not have, in its dtype."""
    ahead = values.dim() - gain.dim()
    dims = [*range(ahead), *(ahead + dim for dim, size in enumerate(gain.shape) if size == 1)]
    return (values.sum(dims, dtype=gain.dtype) if dims else values.to(gain.dtype, copy=True)).view(gain.shape)
