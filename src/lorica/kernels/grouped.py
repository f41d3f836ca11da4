"""Stacks of experts: rows sorted by expert, each expert's rows multiplied with its weight and its factors.

::

    y = x W_e          one grouped product, in whatever way the base layer makes it
    h = s·x A_eᵀ       then y += h B_eᵀ in place, expert by expert: no second matrix of the output's size
    G = s·g B_e        backward: dx = g W_eᵀ, then dx += G A_e in place
    dA_e = Gᵀ x        dB_e = gᵀ h

Kept for backward are ``x`` and ``h``. Where an expert's rows begin is read on the host, so the loop over experts is for
the CPU; elsewhere the plain form's grouped products leave the device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorica.kernels.function import differentiable, in_reverse

#: The base layer's own product, ``multiply(x, weight, offs=offsets)``.
Multiply = Callable[..., Tensor]

#: Bytes that the rows of an operand of torch's grouped product must be a multiple of.
_ALIGNMENT = 16


def plain(
    multiply: Multiply, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, offsets: Tensor
) -> Tensor:
    """Return ``x W_e + s·(x A_eᵀ) B_eᵀ`` for each expert ``e``, whose rows end at ``offsets[e]``.

    Args:
        multiply: the grouped product.
        x: ``[S, in]``, sorted by expert. Rows behind the last offset are no expert's; what they become means nothing.
        weight: ``[E, in, out]``, frozen, in the dtype of ``x``.
        a: ``[E, r, in]``, or ``[r, in]`` where all experts share it; it follows the dtype of ``x``.
        b: ``[E, out, r]`` or ``[out, r]``, likewise.
        scaling: ``s``.
        offsets: ``[E]``.
    """
    y = multiply(x, weight, offs=offsets)
    return torch.add(y, part(multiply, x, a, b, offsets), alpha=scaling)


def part(multiply: Multiply, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return ``(x A_eᵀ) B_eᵀ``, ``[S, out]``; see :func:`plain`."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    if a.dim() == 2:
        return x @ a.mT @ b.mT
    if multiply.__name__ == "grouped_mm_fallback" or _aligned(x, a):
        return multiply(multiply(x, a.mT, offs=offsets), b.mT, offs=offsets)
    groups = Groups(multiply, offsets, len(x))
    found = [x_e @ a_e.mT @ b_e.mT for x_e, a_e, b_e in groups.of((x,), (a, b))]
    return torch.cat([*found, x.new_zeros(groups.sizes[-1], b.shape[1])])


def _aligned(x: Tensor, a: Tensor) -> bool:
    return a.shape[1] * x.element_size() % _ALIGNMENT == 0


# ---- products of rows and experts -----------------------------------------------------------------------------------


class Groups:
    """Rows sorted by expert, and the products of them, in loops on the host.

    Args:
        multiply: the base layer's product.
        offsets: where each expert's rows end.
        rows: how many there are, those behind the last expert's included.
    """

    def __init__(self, multiply: Multiply, offsets: Tensor, rows: int) -> None:
        self.multiply = multiply
        self.offsets = offsets
        self.rows = rows

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each expert has, and then how many have none."""
        ends = self.offsets.tolist()
        return [end - start for start, end in zip([0, *ends], [*ends, self.rows], strict=True)]

    def of(self, rows: tuple[Tensor, ...], stacks: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """Yield, for each expert that has rows, its rows of each tensor and its matrix of each stack."""
        columns = (*(torch.split(tensor, self.sizes) for tensor in rows), *(stack.unbind(0) for stack in stacks))
        for size, *mine in zip(self.sizes, *columns, strict=False):  # the last size belongs to no expert
            if size:
                yield tuple(mine)

    def product(self, x: Tensor, stack: Tensor) -> Tensor:
        """Return ``x_e stack_e``, ``[S, columns]``."""
        out = x.new_empty(len(x), stack.shape[2])
        for x_e, out_e, stack_e in self.of((x, out), (stack,)):
            torch.mm(x_e, stack_e, out=out_e)
        return out

    def add(self, y: Tensor, h: Tensor, stack: Tensor) -> None:
        """Add ``h_e stack_e`` to ``y``."""
        for y_e, h_e, stack_e in self.of((y, h), (stack,)):
            y_e.addmm_(h_e, stack_e)

    def outer(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ``first_eᵀ second_e`` of every expert, zero where one has no rows."""
        out = first.new_empty(len(self.sizes) - 1, first.shape[1], second.shape[1])
        halves = torch.split(first, self.sizes), torch.split(second, self.sizes)
        for first_e, second_e, out_e in zip(*halves, out, strict=False):
            torch.mm(first_e.t(), second_e, out=out_e)
        return out


class Fast(Groups):
    """The same by torch's grouped product, where it can: its loop over experts costs less."""

    def product(self, x: Tensor, stack: Tensor) -> Tensor:
        """Return ``x_e stack_e``."""
        return self.multiply(x, stack, offs=self.offsets)

    def outer(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ``first_eᵀ second_e``."""
        return self.multiply(first.t(), second, offs=self.offsets)


class Shared(Groups):
    """All rows are one group: the experts share their factors."""

    def product(self, x: Tensor, stack: Tensor) -> Tensor:
        """Return ``x stack``."""
        return x.mm(stack)

    def add(self, y: Tensor, h: Tensor, stack: Tensor) -> None:
        """Add ``h stack`` to ``y``."""
        y.addmm_(h, stack)

    def outer(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ``firstᵀ second``."""
        return first.t().mm(second)


def _groups(multiply: Multiply, x: Tensor, a: Tensor, offsets: Tensor) -> Groups:
    if a.dim() == 2:
        return Shared(multiply, offsets, len(x))
    fast = multiply.__name__ in ("grouped_mm", "_grouped_mm") and _aligned(x, a)
    return (Fast if fast else Groups)(multiply, offsets, len(x))


# ---- in place -------------------------------------------------------------------------------------------------------


def inference(
    multiply: Multiply, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, offsets: Tensor
) -> Tensor:
    """See :func:`plain`; nothing is recorded."""
    y = multiply(x, weight, offs=offsets)
    if a.dim() == 3 and 2 * len(x) <= len(a):
        return _few(y, x, a, b, scaling, offsets)
    a, b, groups = a.to(x.dtype), b.to(x.dtype), _groups(multiply, x, a, offsets)
    groups.add(y, groups.product(x, a.mT).mul_(scaling), b.mT)
    return y


def _few(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, offsets: Tensor) -> Tensor:
    """Add the part of fewer rows than experts: the factors of each row's expert are taken out, the others not read."""
    rows = torch.arange(len(x), dtype=offsets.dtype, device=offsets.device)
    # A row of no expert is given the last one's factors: its output means nothing.
    experts = torch.searchsorted(offsets, rows, right=True).clamp_(max=len(a) - 1)
    a_SRI, b_SOR = a.index_select(0, experts).to(x.dtype), b.index_select(0, experts).to(x.dtype)
    h_SR1 = torch.bmm(a_SRI, x.unsqueeze(-1))
    y.unsqueeze(-1).baddbmm_(b_SOR, h_SR1, alpha=scaling)
    return y


def function(
    multiply: Multiply, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, offsets: Tensor
) -> Tensor:
    """See :func:`plain`."""
    y: Tensor = _Grouped.apply(multiply, x, weight, a.to(x.dtype), b.to(x.dtype), scaling, offsets)  # type: ignore[no-untyped-call]
    return y


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, multiply: Multiply, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, offsets: Tensor
    ) -> Tensor:
        y, groups = multiply(x, weight, offs=offsets), _groups(multiply, x, a, offsets)
        h = groups.product(x, a.mT).mul_(scaling)
        groups.add(y, h, b.mT)
        trains = ctx.needs_input_grad
        ctx.save_for_backward(x if trains[3] else None, h if trains[4] else None, weight, a, b)
        ctx.groups, ctx.scaling = groups, scaling
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        gradients = _differentiable if torch.is_grad_enabled() else _gradients
        dx, d_a, d_b = gradients(ctx, g, ctx.needs_input_grad[1:2] + ctx.needs_input_grad[3:5])
        return None, dx, None, d_a, d_b, None, None


def _gradients(ctx: Any, g: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    (x, h, weight, a, b), groups = ctx.saved_tensors, ctx.groups
    g, dx, d_a = g.contiguous(), None, None
    if needs[0] or needs[1]:
        G = groups.product(g, b).mul_(ctx.scaling)
        if needs[0]:
            dx = groups.multiply(g, weight.mT, offs=groups.offsets)
            groups.add(dx, G, a)
        d_a = groups.outer(G, x) if needs[1] else None
    return dx, d_a, groups.outer(g, h) if needs[2] else None


def _differentiable(ctx: Any, g: Tensor, needs: tuple[bool, ...]) -> Sequence[Tensor | None]:
    (x, _, weight, a, b), groups = ctx.saved_tensors, ctx.groups

    def run(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        return [plain(groups.multiply, x, weight, a, b, ctx.scaling, groups.offsets)]

    return differentiable(run, (x, a, b), needs, [g])


# ---- which of them --------------------------------------------------------------------------------------------------


def inference_fits(multiply: Multiply, x: Tensor, *rest: Any) -> bool:
    """Nothing is recorded, and where an expert's rows begin can be read."""
    return not torch.is_grad_enabled() and x.device.type == "cpu" and in_reverse()


def function_fits(multiply: Multiply, x: Tensor, *rest: Any) -> bool:
    """What is differentiated is differentiated in reverse, and where an expert's rows begin can be read."""
    return x.device.type == "cpu" and in_reverse()
