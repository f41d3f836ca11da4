"""Collectives in conjugate pairs: the backward of each is the forward of the other.

==================  =======================  =======================
function            forward                  backward
==================  =======================  =======================
``enter``           identity                 all-reduce
``leave``           all-reduce               identity
``split``           own slice                all-gather
``gather``          all-gather               own slice
``sequence_gather`` all-gather               reduce-scatter
``sequence_reduce`` reduce-scatter           all-gather
``sequence_swap``   all-to-all, own sum      all-gather
==================  =======================  =======================

The first two are f and g of Megatron-LM (Shoeybi et al., 2019, section 3), ``sequence_gather`` and ``sequence_reduce``
those of sequence parallelism (Korthikanti et al., 2022, section 4.2). ``sequence_swap`` gives what ``sequence_reduce``
gives, summed here in the order of the ranks, whatever algorithm a backend reduces by; for what is narrow. On an axis of
one rank each returns its input and sends nothing.

Lengths may differ between ranks, and may be zero: what is sent is padded to the longest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.engines.site import Axis
from lorica.errors import LayoutError

# torch renamed both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shares(length: int, ranks: int) -> tuple[int, ...]:
    """Return how many of ``length`` tokens each rank has: as equal as can be, the first ranks one more."""
    return tuple((length + ranks - 1 - rank) // ranks for rank in range(ranks))


def enter(x: Tensor, axis: Axis) -> Tensor:
    """Return ``x``; its gradient is summed over the axis. For what every rank multiplies with its own columns."""
    return x if axis.size == 1 else _apply(_Enter, x, axis)


def leave(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of ``x`` over the axis. For what every rank computed from its own rows."""
    return x if axis.size == 1 else _apply(_Leave, x, axis)


def split(x: Tensor, axis: Axis, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """Return this rank's slice of an ``x`` that all ranks have.

    Args:
        x: any tensor, the same on all ranks.
        axis: over which to divide.
        dim: along which to divide.
        sizes: lengths of the slices, one for each rank; None: :func:`shares`.
    """
    if axis.size == 1:
        return x
    sizes = shares(x.shape[dim], axis.size) if sizes is None else tuple(sizes)
    _check(sum(sizes) == x.shape[dim], x, axis, dim, sizes)
    return _apply(_Split, x, axis, dim, sizes)


def gather(x: Tensor, axis: Axis, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """Return the slices of all ranks, one after the other, for a use that is the same on all ranks.

    Args:
        x: this rank's slice.
        axis: over which to gather.
        dim: along which the slices lie.
        sizes: lengths of the slices, one for each rank; None: the ranks tell each other, in one more collective.
    """
    return x if axis.size == 1 else _apply(_Gather, x, axis, dim, _sizes(x, axis, dim, sizes))


def sequence_gather(x: Tensor, axis: Axis, dim: int = -2, sizes: Sequence[int] | None = None) -> Tensor:
    """Return the tokens of all ranks, for a use that differs between ranks; arguments as in :func:`gather`."""
    return x if axis.size == 1 else _apply(_SequenceGather, x, axis, dim, _sizes(x, axis, dim, sizes))


def sequence_reduce(x: Tensor, axis: Axis, dim: int = -2, sizes: Sequence[int] | None = None) -> Tensor:
    """Return this rank's tokens of the sum of ``x`` over the axis; arguments as in :func:`split`."""
    if axis.size == 1:
        return x
    sizes = shares(x.shape[dim], axis.size) if sizes is None else tuple(sizes)
    _check(sum(sizes) == x.shape[dim], x, axis, dim, sizes)
    return _apply(_SequenceReduce, x, axis, dim, sizes)


def sequence_swap(x: Tensor, axis: Axis, dim: int = -2, sizes: Sequence[int] | None = None) -> Tensor:
    """Return this rank's tokens of the sum of ``x`` over the axis, in one all-to-all; arguments as in :func:`split`."""
    if axis.size == 1:
        return x
    sizes = shares(x.shape[dim], axis.size) if sizes is None else tuple(sizes)
    _check(sum(sizes) == x.shape[dim], x, axis, dim, sizes)
    return _apply(_SequenceSwap, x, axis, dim, sizes)


def lengths(x: Tensor, axis: Axis, dim: int) -> tuple[int, ...]:
    """Return how long ``x`` is along a dimension on each rank of the axis, in one small collective."""
    return (x.shape[dim],) if axis.size == 1 else _sizes(x, axis, dim, None)


# ---- the pairs -----------------------------------------------------------------------------------------------------


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _summed(gradient, ctx.axis), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _summed(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient, None


class _Along(torch.autograd.Function):
    """What the four that divide a dimension have in common: the axis, the dimension and the lengths."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, *ctx.along = inputs


class _Split(_Along):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        return _own(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _gathered(gradient, *ctx.along), None, None, None


class _Gather(_Along):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        return _gathered(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _own(gradient, *ctx.along), None, None, None


class _SequenceGather(_Along):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        return _gathered(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _scattered(gradient, *ctx.along), None, None, None


class _SequenceReduce(_Along):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        return _scattered(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _gathered(gradient, *ctx.along), None, None, None


class _SequenceSwap(_Along):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        return _swapped(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _gathered(gradient, *ctx.along), None, None, None


# ---- on plain tensors ----------------------------------------------------------------------------------------------


def _summed(x: Tensor, axis: Axis) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _own(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
    return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank]).contiguous()


def _gathered(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
    longest = max(sizes)
    first = _padded(x.movedim(dim, 0), longest)
    every = first.new_empty(axis.size * longest, *first.shape[1:])
    _all_gather(every, first, group=axis.group)
    pieces = [piece[:size].movedim(0, dim) for piece, size in zip(torch.split(every, longest), sizes, strict=True)]
    return torch.cat(pieces, dim)


def _scattered(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
    longest = max(sizes)
    every = torch.cat([_padded(piece.movedim(dim, 0), longest) for piece in torch.split(x, list(sizes), dim)])
    own = every.new_empty(longest, *every.shape[1:])
    _reduce_scatter(own, every, group=axis.group)
    return own[: sizes[axis.rank]].movedim(0, dim).contiguous()


def _swapped(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    own = sizes[axis.rank]
    every = first.new_empty(axis.size * own, *first.shape[1:])
    dist.all_to_all_single(every, first, [own] * axis.size, list(sizes), group=axis.group)
    parts = every.view(axis.size, own, *first.shape[1:]).unbind(0)
    return functools.reduce(torch.add, parts).movedim(0, dim)


def _padded(x: Tensor, length: int) -> Tensor:
    if x.shape[0] == length:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(length - x.shape[0], *x.shape[1:])])


def _sizes(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    if sizes is None:
        own = torch.tensor([x.shape[dim]], device=x.device)
        every = own.new_empty(axis.size)
        _all_gather(every, own, group=axis.group)
        return tuple(every.tolist())
    _check(len(sizes) == axis.size and sizes[axis.rank] == x.shape[dim], x, axis, dim, sizes)
    return tuple(sizes)


def _check(fits: bool, x: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> None:
    if not fits:
        raise LayoutError(
            f"axis {axis.name!r}, rank {axis.rank}: {tuple(x.shape)} does not fit the lengths {tuple(sizes)} along "
            f"dimension {dim}"
        )


def _apply(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    result: Tensor = function.apply(x, *arguments)
    return result


__all__ = [
    "enter",
    "gather",
    "leave",
    "lengths",
    "sequence_gather",
    "sequence_reduce",
    "sequence_swap",
    "shares",
    "split",
]
