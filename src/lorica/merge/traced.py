"""Following a tensor's elements through operations that only move them.

transformers converts checkpoints while it loads them: experts that lie one by one in a file are stacked, projections
are fused or split, matrices turned. Its own code does that here too, on tensors that have a shape and no values and
remember where every rectangle of them came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]


class NotFollowedError(Exception):
    """Something was done that does more than move elements, or moves them in a way that is not known here."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a parameter that is a rectangle of a stored tensor.

    Attributes:
        key: name of the stored tensor.
        view: from the stored tensor to the rectangle, as a view of its memory in the parameter's orientation.
        start: where in the parameter it begins.
        shape: of the rectangle.
    """

    key: str
    view: View
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """The rectangle as slices of the parameter."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.shape, strict=True))


class Traced:
    """A tensor without values, made of pieces of stored ones.

    Args:
        shape: its shape.
        pieces: cover it, without overlap.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = tuple(pieces)

    @classmethod
    def stored(cls, key: str, shape: Sequence[int]) -> Traced:
        """Return a whole stored tensor."""
        return cls(shape, [Piece(key, lambda tensor: tensor, (0,) * len(shape), tuple(shape))])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what ``torch.cat`` and its like do, for the few that only move elements."""
        if function not in _FUNCTIONS:
            raise NotFollowedError(f"{getattr(function, '__name__', function)} is not followed")
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> NoReturn:
        """Anything that is not followed."""
        raise NotFollowedError(f".{name} is not followed")

    def __getitem__(self, index: Any) -> Traced:
        """All of it; that is how transformers reads a tensor of a file."""
        if index is not Ellipsis:
            raise NotFollowedError(f"[{index}] is not followed")
        return self

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Traced:
        """The same: memory is the reader's business."""
        return self

    def narrow(self, dim: int, start: int, length: int) -> Traced:
        """A range along a dimension."""
        dim %= self.ndim
        kept = []
        for piece in self.pieces:
            first = max(piece.start[dim], start)
            stop = min(piece.start[dim] + piece.shape[dim], start + length)
            if first < stop:
                kept.append(_narrow(piece, dim, first - piece.start[dim], stop - first, first - start))
        return Traced(_with(self.shape, dim, length), kept)

    def transpose(self, dim0: int, dim1: int) -> Traced:
        """Two dimensions exchanged."""
        dim0, dim1 = dim0 % self.ndim, dim1 % self.ndim

        def turn(sizes: Sequence[int]) -> tuple[int, ...]:
            turned = list(sizes)
            turned[dim0], turned[dim1] = sizes[dim1], sizes[dim0]
            return tuple(turned)

        pieces = [
            Piece(p.key, _after(p.view, lambda t: t.transpose(dim0, dim1)), turn(p.start), turn(p.shape))
            for p in self.pieces
        ]
        return Traced(turn(self.shape), pieces)

    def unsqueeze(self, dim: int) -> Traced:
        """A dimension of one more."""
        dim %= self.ndim + 1
        pieces = [
            Piece(
                p.key,
                _after(p.view, lambda t: t.unsqueeze(dim)),
                (*p.start[:dim], 0, *p.start[dim:]),
                (*p.shape[:dim], 1, *p.shape[dim:]),
            )
            for p in self.pieces
        ]
        return Traced((*self.shape[:dim], 1, *self.shape[dim:]), pieces)

    def squeeze(self, dim: int) -> Traced:
        """A dimension of one less."""
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        pieces = [
            Piece(
                p.key,
                _after(p.view, lambda t: t.squeeze(dim)),
                (*p.start[:dim], *p.start[dim + 1 :]),
                (*p.shape[:dim], *p.shape[dim + 1 :]),
            )
            for p in self.pieces
        ]
        return Traced((*self.shape[:dim], *self.shape[dim + 1 :]), pieces)


def _with(sizes: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _after(view: View, step: View) -> View:
    return lambda tensor: step(view(tensor))


def _narrow(piece: Piece, dim: int, first: int, length: int, start: int) -> Piece:
    """Return ``length`` positions of a piece from its ``first`` on, which begin at ``start`` in the new tensor."""
    view = piece.view
    if length < piece.shape[dim]:
        view = _after(view, lambda tensor: tensor.narrow(dim, first, length))
    return Piece(piece.key, view, _with(piece.start, dim, start), _with(piece.shape, dim, length))


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].ndim
    pieces: list[Piece] = []
    place = 0
    for tensor in tensors:
        if _with(tensor.shape, dim, 0) != _with(tensors[0].shape, dim, 0):
            raise NotFollowedError(f"shapes {tuple(tensor.shape)} and {tuple(tensors[0].shape)} in one torch.cat")
        pieces += [replace(p, start=_with(p.start, dim, p.start[dim] + place)) for p in tensor.pieces]
        place += tensor.shape[dim]
    return Traced(_with(tensors[0].shape, dim, place), pieces)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _split(tensor: Traced, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Traced, ...]:
    length, sizes = tensor.shape[dim], split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    if sum(sizes) != length:
        raise NotFollowedError(f"torch.split of {length} into {list(sizes)}")
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(tensor.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _chunk(input: Traced, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
    return _split(input, max(1, -(-input.shape[dim] // chunks)), dim)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.transpose: lambda input, dim0, dim1: input.transpose(dim0, dim1),
    torch.squeeze: lambda input, dim: input.squeeze(dim),
    torch.unbind: lambda input, dim=0: tuple(p.squeeze(dim) for p in _split(input, 1, dim)),
}

__all__ = ["NotFollowedError", "Piece", "Traced"]
