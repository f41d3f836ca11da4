"""Second moments of a stream of rows, and the directions in which it varies most.

Two ways to keep them, with one face: the whole matrix, and a sketch of it where that would be too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.calibration.over_ranks import summed
from lorica.init import target_generator
from lorica.lowrank import sketched_eigh

#: Up to so many features the matrix is kept whole: 64 MiB in float32.
WHOLE_UP_TO = 4096
#: Up to so many features it is decomposed exactly, in float64.
EXACT_UP_TO = 128
#: Rounds of the subspace iteration, and directions that it has to spare: with fewer, even spectra lose some variance.
ROUNDS, SPARE = 8, 16
#: Features of a block of the matrix; of two blocks that mirror each other, one is added up.
BLOCK = 128
#: Rows of a sketch, and how many times the wanted directions it has at least.
SKETCH_ROWS, SKETCH_TIMES = 256, 8


class Directions(NamedTuple):
    """The directions in which rows vary most.

    Attributes:
        squares: ``[k]``, falling: the sum of squares along each direction, of the rows without their mean.
        vectors: ``[k, in]``, orthonormal; the largest entry of each is positive.
        total: the sum of squares along all directions.
        rows: how many rows there were.
    """

    squares: Tensor
    vectors: Tensor
    total: float
    rows: int


class Stream(Protocol):
    """What keeps the second moments of rows ``[T, in]``."""

    count: int

    def add(self, x_TI: Tensor) -> None:
        """Take in rows."""

    def directions(self, k: int, name: str, groups: Iterable[Any] = ()) -> Directions:
        """Return the first ``k`` directions of what all ranks of the groups took in.

        Args:
            k: how many, up to ``in``.
            name: of the layer: seeds the start of the iteration, so that it is the same wherever the layer lies.
            groups: process groups.
        """


def stream_for(features: int, k: int, device: torch.device) -> Stream:
    """Return what keeps the moments of rows of that many features, of which ``k`` directions are wanted."""
    if features <= WHOLE_UP_TO:
        return Moments(features, device)
    return Sketch(features, max(SKETCH_ROWS, SKETCH_TIMES * k), device)


class Moments:
    """The number of rows, their mean, and the sum of ``(x - mean)(x - mean)ᵀ``, kept without cancellation
    (https://doi.org/10.1080/00031305.1983.10483115, Chan, Golub and LeVeque)."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.mean_I = torch.zeros(features, device=device)
        self.scatter_II = torch.zeros(features, features, device=device)
        self._found: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        """Take in rows, in float32."""
        if not len(x_TI):
            return
        x_TI = x_TI.float()
        mean, count = x_TI.mean(0), self.count + len(x_TI)
        centred, step = x_TI - mean, mean - self.mean_I
        for here, left in _blocks(len(self.mean_I)):
            self.scatter_II[here, left].addmm_(centred[:, here].T, centred[:, left])
        self.scatter_II.addr_(step, step, alpha=self.count * len(x_TI) / count)
        self.mean_I.add_(step, alpha=len(x_TI) / count)
        self.count = count

    def directions(self, k: int, name: str, groups: Iterable[Any] = ()) -> Directions:
        """Exact up to :data:`EXACT_UP_TO` features; beyond by subspace iteration, from where it ended the last time."""
        for here, left in _blocks(len(self.mean_I)):
            self.scatter_II[left, here] = self.scatter_II[here, left].T.clone()
        scatter, count = self._reduced(list(groups))
        total = float(scatter.diagonal().double().sum())
        squares, rows = self._leading(scatter, k, name)
        return Directions(squares[:k], signed(rows[:k]), total, count)

    def _leading(self, scatter: Tensor, k: int, name: str) -> tuple[Tensor, Tensor]:
        if len(scatter) <= max(EXACT_UP_TO, k + SPARE):
            values, vectors = torch.linalg.eigh(scatter.double())
            return values.flip(0).clamp(min=0).float(), vectors.T.flip(0).float()
        start = self._found
        if start is None or len(start) != k + SPARE:
            start = torch.empty(k + SPARE, len(scatter)).normal_(generator=target_generator(0, name)).to(scatter)
        squares, self._found = sketched_eigh(scatter, start, rounds=ROUNDS)
        return squares, self._found

    def _reduced(self, groups: list[Any]) -> tuple[Tensor, int]:
        if not groups:
            return self.scatter_II, self.count
        sums = torch.cat([self.mean_I.double() * self.count, self.mean_I.new_tensor([self.count]).double()])
        sums = summed(sums, groups)
        mean = (sums[:-1] / sums[-1].clamp(min=1)).float()
        step = self.mean_I - mean
        return summed(torch.addr(self.scatter_II, step, step, alpha=self.count), groups), int(sums[-1])


def _blocks(features: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each block on the diagonal, and the columns of that block and of all that are left of it."""
    for first in range(0, features, BLOCK):
        yield slice(first, first + BLOCK), slice(0, min(first + BLOCK, features))


class Sketch:
    """Frequent directions: ``rows`` rows ``B`` with ``0 ≤ CᵀC - BᵀB ≤ ‖C - C_k‖²_F / (rows - k)`` for every ``k``,
    of the centred rows ``C`` of the stream (https://arxiv.org/abs/1501.01711, theorem 1.1).

    So no square along a direction is off by more than that part of what ``k`` directions leave over. The result depends
    on the order of the rows within this bound, and so does what ranks find together.
    """

    def __init__(self, features: int, rows: int, device: torch.device) -> None:
        self.count = 0
        self.rows = rows
        self.mean_I = torch.zeros(features, device=device)
        self.total = 0.0
        self._held = 0
        self._buffer = torch.zeros(2 * rows, features, device=device)

    def add(self, x_TI: Tensor) -> None:
        """Take in rows, in float32; a row for the move of the mean keeps the sum centred."""
        if not len(x_TI):
            return
        x_TI = x_TI.float()
        mean, count = x_TI.mean(0), self.count + len(x_TI)
        moved = (mean - self.mean_I) * (self.count * len(x_TI) / count) ** 0.5
        self._append(torch.cat([x_TI - mean, moved.unsqueeze(0)]))
        self.mean_I += (mean - self.mean_I) * (len(x_TI) / count)
        self.count = count

    def directions(self, k: int, name: str, groups: Iterable[Any] = ()) -> Directions:
        """The leading directions of the sketch, or of all ranks' sketches merged (theorem 1.1 holds for the sum)."""
        merged = self
        for group in groups:
            merged = merged._merged(group)
        merged._shrink(merged.rows)
        squares, rows = _rows_of(merged._buffer[: merged._held])
        return Directions(squares[:k], signed(rows[:k]), merged.total, merged.count)

    def _append(self, rows: Tensor) -> None:
        self.total += float(rows.double().square().sum())
        for part in torch.split(rows, self.rows):
            if self._held + len(part) > len(self._buffer):
                self._shrink(self.rows)
            self._buffer[self._held : self._held + len(part)] = part
            self._held += len(part)

    def _shrink(self, rows: int) -> None:
        """Leave at most ``rows`` rows: every square falls by that of the first row that has no place."""
        squares, vectors = _rows_of(self._buffer[: self._held])
        if len(squares) > rows:
            squares = (squares[:rows] - squares[rows]).clamp(min=0)
        self._held = len(squares)
        self._buffer[: self._held] = squares.sqrt().unsqueeze(1) * vectors[: self._held]

    def _merged(self, group: Any) -> Sketch:
        parts: list[Any] = [None] * dist.get_world_size(group)
        mine = (self.count, self.mean_I.cpu(), self.total, self._buffer[: self._held].cpu())
        dist.all_gather_object(parts, mine, group=group)
        result = Sketch(len(self.mean_I), self.rows, self.mean_I.device)
        for count, mean, total, rows in parts:
            both = result.count + count
            step = mean.to(result.mean_I) - result.mean_I
            moved = step * (result.count * count / max(both, 1)) ** 0.5
            result._append(torch.cat([rows.to(moved), moved.unsqueeze(0)]))
            result.mean_I += step * (count / max(both, 1))
            result.count = both
            result.total += total - float(rows.double().square().sum())  # what its shrinking took
        return result


def _rows_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared singular values, falling, and the right singular vectors ``[k, in]``, from the small side."""
    squares, left = torch.linalg.eigh((matrix @ matrix.T).double())
    squares, left = squares.flip(0).clamp(min=0), left.flip(1)
    there = squares > squares[:1] * 1e-12
    squares, left = squares[there].float(), left[:, there].float()
    return squares, (left.T @ matrix) / squares.sqrt().unsqueeze(1)


def signed(rows: Tensor) -> Tensor:
    """Return the rows with signs that make the largest entry of each positive."""
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -rows, rows)


__all__ = ["Directions", "Moments", "Sketch", "Stream", "signed", "stream_for"]
