"""Random layouts, and what they mean: a cut as the list of logical positions that each rank holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.layout import Cut, HeadOrder, Layout, Roles, even, fused, grouped_heads

#: The same examples on every run, and no time limit on a busy machine.
law = settings(deadline=None, derandomize=True, max_examples=60)

#: Roles of every kind of tensor that a layout is asked about.
ROLES: list[Roles] = [
    ("rank", "in"),
    ("out", "rank"),
    ("out",),
    ("out", "in"),
    ("in", "out"),
    ("expert", "rank", "in"),
    ("expert", "out", "rank"),
    ("expert", "out", "in"),
    ("rank",),
    (),
]


def positions(cut: Cut, coordinate: int) -> list[int]:
    """The logical positions that a rank holds, in local order: the meaning of a cut, one by one."""
    return [place for start, stop in cut.held[coordinate] for place in range(start, stop)]


def runs(places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The intervals of a list of positions, each as long as it can be."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return tuple(found)


def ranks(layout: Layout) -> Iterator[dict[str, int]]:
    """The coordinates of every rank on the axes that cut."""
    for place in itertools.product(*(range(cut.size) for cut in layout.cuts)):
        yield {cut.axis: coordinate for cut, coordinate in zip(layout.cuts, place, strict=True)}


def place_of(layout: Layout, role: str, length: int, at: Mapping[str, int]) -> list[int]:
    """The positions of a dimension that a rank holds."""
    cut = next((cut for cut in layout.cuts if cut.dim == role), None)
    return list(range(length)) if cut is None else positions(cut, at[cut.axis])


def shape_of(layout: Layout, roles: Roles, rank: int = 3) -> tuple[int, ...]:
    """The logical shape of a tensor with these roles."""
    return tuple(rank if role == "rank" else layout.sizes[role] for role in roles)


def numbered(shape: Sequence[int]) -> Tensor:
    """A tensor whose elements are all different."""
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(tuple(shape))


@st.composite
def dealt(draw: Any, axis: str, dim: Any, copies: int | None = None) -> Cut:
    """A cut that follows no rule: shuffled positions, dealt to ranks in hands of any size, each ``copies`` times."""
    length = draw(st.integers(1, 12))
    copies = draw(st.integers(1, 3)) if copies is None else copies
    hands: list[list[int]] = []
    for _ in range(copies):
        deck = draw(st.permutations(range(length)))
        marks = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
        hands += [list(deck[a:b]) for a, b in itertools.pairwise([0, *marks, length])]
    return Cut(axis, dim, tuple(runs(hand) for hand in draw(st.permutations(hands))))


@st.composite
def orders(draw: Any) -> tuple[HeadOrder, int, int, int]:
    """An order of heads, with the numbers of query heads, key/value heads and copies."""
    slots, m, kv_heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 6))
    total = kv_heads * m
    sizes = [size for size in range(1, total + 1) if total % size == 0 and size % m == 0]
    heads = kv_heads * m * slots
    size = draw(st.sampled_from(sizes))
    side_by_side = total == size or m == 1  # otherwise a rank would hold a head twice
    how = draw(st.sampled_from(["strided", "neighbours"] if side_by_side else ["strided"]))
    order = grouped_heads(size, heads, kv_heads, multiplier=m, order=how)
    return order, heads, kv_heads, m


def cuts(axis: str, dim: Any, *, copies: int | None = None) -> st.SearchStrategy[Cut]:
    """Cuts of one dimension: even or not, fused, and without any rule."""
    return st.one_of(
        st.builds(even, st.just(axis), st.just(dim), st.integers(1, 12), st.integers(1, 5)),
        st.builds(
            fused,
            st.just(axis),
            st.just(dim),
            st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
            st.integers(1, 4),
        ),
        dealt(axis, dim, copies),
    )


@st.composite
def layouts(draw: Any) -> Layout:
    """Layouts with up to three cuts, over an axis each."""
    sizes: dict[str, int] = {"out": draw(st.integers(1, 8)), "in": draw(st.integers(1, 8)), "expert": 3}
    chosen: list[Cut] = []
    for axis, dim, copies in (("rows", "out", None), ("columns", "in", 1), ("ep", "expert", None)):
        if draw(st.booleans()):
            cut = draw(cuts(axis, dim, copies=copies))
            chosen.append(cut)
            sizes[dim] = cut.total
    parts: list[tuple[str, int]] = []
    if all(cut.dim != "out" or cut.copies == 1 for cut in chosen) and draw(st.booleans()):
        marks = draw(st.lists(st.integers(1, sizes["out"]), unique=True, max_size=3).map(sorted))
        bounds = itertools.pairwise(dict.fromkeys([0, *marks, sizes["out"]]))
        parts = [(f"part{index}", stop - start) for index, (start, stop) in enumerate(bounds)]
    named = st.sampled_from(["rows", "columns", "ep", "cp", "dp"])
    sequence = draw(st.lists(named, unique=True, max_size=2))
    data = draw(st.lists(named.filter(lambda axis: axis not in sequence), unique=True, max_size=2))
    return Layout(sizes, tuple(draw(st.permutations(chosen))), tuple(parts), tuple(sequence), tuple(data))
