"""How one dimension of a logical weight is divided over one axis of a mesh.

A cut says, for every rank on the axis, which intervals of the logical dimension it holds, and in which order
it holds them. Even shards, fused projections, head slots, strided shards and copies are all the same to it: data.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lorica.errors import LayoutError

#: Half-open intervals of a logical dimension, in local order.
Held = tuple[tuple[int, int], ...]
#: Dimensions of a weight: rows of B, columns of A (of an embedding: its vocabulary), experts.
Dim = Literal["out", "in", "expert"]
DIMS: tuple[Dim, ...] = get_args(Dim)


@dataclass(frozen=True)
class Cut:
    """One dimension over one mesh axis.

    Attributes:
        axis: name of the mesh axis.
        dim: which dimension of the weight.
        held: for each coordinate on the axis, what it holds.
    """

    axis: str
    dim: Dim
    held: tuple[Held, ...]

    @property
    def size(self) -> int:
        """Ranks on the axis."""
        return len(self.held)

    def length(self, coordinate: int) -> int:
        """Return how many positions the rank at ``coordinate`` holds."""
        return sum(stop - start for start, stop in self.held[coordinate])

    @functools.cached_property
    def copies(self) -> int:
        """How many ranks hold each position, at most; 1 where nothing is held twice."""
        return max(self._covered[1])

    @functools.cached_property
    def total(self) -> int:
        """The logical length.

        Raises:
            LayoutError: a position below the last one is held by nobody.
        """
        return self._covered[0]

    @functools.cached_property
    def uneven(self) -> bool:
        """Whether some positions are held by more ranks than others: keys and values fused with queries."""
        return len(self._covered[1]) > 1

    def counted(self, coordinate: int) -> list[tuple[int, int, int]]:
        """Return the intervals of the local dimension of the rank at ``coordinate``, with how many ranks hold each."""
        edges = sorted({edge for held in self.held for interval in held for edge in interval})
        found, place = [], 0
        for start, stop in self.held[coordinate]:
            for low, high in itertools.pairwise([start, *(edge for edge in edges if start < edge < stop), stop]):
                count = sum(first <= low < last for held in self.held for first, last in held)
                found.append((place, place + high - low, count))
                place += high - low
        return found

    def within(self, first: int, last: int) -> Cut:
        """Return the cut of the positions from ``first`` to ``last`` (exclusive) alone."""
        held = tuple(
            tuple(
                (max(start, first) - first, min(stop, last) - first)
                for start, stop in intervals
                if max(start, first) < min(stop, last)
            )
            for intervals in self.held
        )
        return Cut(self.axis, self.dim, held)

    def check(self, *, evenly: bool = True) -> None:
        """Refuse a cut that loses positions or, with ``evenly``, holds some more often than others.

        Raises:
            LayoutError: says which position.
        """
        _, depths = self._covered
        if evenly and len(depths) > 1:
            raise LayoutError(
                f"axis {self.axis!r}: some of {self.dim!r} is held by {min(depths)} ranks, some by {max(depths)}"
            )
        for coordinate, held in enumerate(self.held):
            if max(_cover(list(held), self.axis, self.dim, whole=False)[1]) > 1:
                raise LayoutError(f"axis {self.axis!r}: rank {coordinate} holds a position of {self.dim!r} twice")

    @functools.cached_property
    def _covered(self) -> tuple[int, set[int]]:
        return _cover([interval for held in self.held for interval in held], self.axis, self.dim)


def _cover(intervals: list[tuple[int, int]], axis: str, dim: str, *, whole: bool = True) -> tuple[int, set[int]]:
    """Return where the intervals end and how often positions are covered."""
    steps: dict[int, int] = {}
    for start, stop in intervals:
        if not 0 <= start < stop:
            raise LayoutError(f"axis {axis!r}: [{start}, {stop}) is not an interval of {dim!r}")
        steps[start] = steps.get(start, 0) + 1
        steps[stop] = steps.get(stop, 0) - 1
    depth, position, depths = 0, 0, set()
    for place in sorted(steps):
        if place > position and (whole or depth):
            depths.add(depth)
            if depth == 0:
                raise LayoutError(f"axis {axis!r}: nobody holds {dim!r} [{position}, {place})")
        depth += steps[place]
        position = place
    return position, depths or {1}


def joined(intervals: Iterable[tuple[int, int]]) -> Held:
    """Return the intervals without the empty ones, neighbours made one."""
    result: list[tuple[int, int]] = []
    for start, stop in intervals:
        if start == stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def chunk(length: int, size: int, coordinate: int) -> tuple[int, int]:
    """Return the interval that torch's ``Shard`` gives a rank: ``ceil(length / size)`` each, the last ones shorter."""
    step = -(-length // size)
    return min(length, coordinate * step), min(length, (coordinate + 1) * step)


@functools.lru_cache(maxsize=4096)
def even(axis: str, dim: Dim, length: int, size: int) -> Cut:
    """Return the cut of ``DTensor``'s ``Shard``: one interval each; ``size`` need not divide ``length``."""
    return Cut(axis, dim, tuple(joined([chunk(length, size, rank)]) for rank in range(size)))


@functools.lru_cache(maxsize=4096)
def fused(axis: str, dim: Dim, lengths: tuple[int, ...], size: int) -> Cut:
    """Return the cut of several projections that lie one after the other, each cut evenly on its own.

    With equal lengths this is ``_StridedShard(split_factor=len(lengths))``.
    """
    held = []
    for rank in range(size):
        start, pieces = 0, []
        for length in lengths:
            first, last = chunk(length, size, rank)
            pieces.append((start + first, start + last))
            start += length
        held.append(joined(pieces))
    return Cut(axis, dim, tuple(held))


def held_by_slots(slots: Sequence[int], unit: int, offset: int = 0) -> Held:
    """Return the intervals of slots of ``unit`` rows each (heads), the first one at ``offset``."""
    return joined((offset + slot * unit, offset + (slot + 1) * unit) for slot in slots)
