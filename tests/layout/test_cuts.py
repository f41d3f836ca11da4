"""A cut is a list of positions for every rank; the ready-made ones are torch's own placements."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from drawn import cuts, dealt, law, positions, runs
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from lorica.errors import LayoutError
from lorica.layout import Cut, Layout, even, fused


@law
@given(cuts("tp", "out"))
def test_length_total_and_copies_count_positions(cut: Cut) -> None:
    held = Counter(place for rank in range(cut.size) for place in positions(cut, rank))
    assert [cut.length(rank) for rank in range(cut.size)] == [len(positions(cut, rank)) for rank in range(cut.size)]
    assert cut.total == max(held) + 1
    assert set(held.values()) == {cut.copies}
    cut.check()


@law
@given(st.integers(1, 40), st.integers(1, 9))
def test_even_is_shard(length: int, size: int) -> None:
    cut = even("tp", "out", length, size)
    for rank in range(size):
        local, offset = Shard.local_shard_size_and_offset(length, size, rank)
        assert positions(cut, rank) == list(range(offset, offset + local))


@law
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_fused_is_strided_shard(unit: int, size: int, parts: int) -> None:
    """The placement that transformers gives packed projections."""
    rows = torch.arange(unit * size * parts)
    cut = fused("tp", "out", (unit * size,) * parts, size)
    shards, _ = _StridedShard(0, split_factor=parts)._split_tensor(rows, size, with_padding=False)
    for rank in range(size):
        assert positions(cut, rank) == shards[rank].tolist()


@law
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple), st.integers(1, 5))
def test_fused_cuts_each_part_evenly(lengths: tuple[int, ...], size: int) -> None:
    layout = Layout(
        {"out": sum(lengths), "in": 2},
        (fused("tp", "out", lengths, size),),
        tuple((str(index), length) for index, length in enumerate(lengths)),
    )
    for index, length in enumerate(lengths):
        alone = layout.part(index).cut_of("out")
        assert alone is not None
        expected = even("tp", "out", length, size)
        assert [positions(alone, rank) for rank in range(size)] == [positions(expected, rank) for rank in range(size)]


@law
@given(dealt("tp", "out", copies=1), st.data())
def test_what_nobody_holds_is_refused(cut: Cut, data: st.DataObject) -> None:
    """Unless it was the end: then the weight is shorter, which the layout's sizes tell."""
    lost = data.draw(st.integers(0, cut.total - 1))
    held = tuple(runs([place for place in positions(cut, rank) if place != lost]) for rank in range(cut.size))
    with pytest.raises(LayoutError):
        Layout({"out": cut.total, "in": 2}, (Cut("tp", "out", held),))


@law
@given(dealt("tp", "out", copies=1), st.data())
def test_what_one_rank_more_holds_is_refused(cut: Cut, data: st.DataObject) -> None:
    """A position with one copy more than the others, on its own rank or on another."""
    again, rank = data.draw(st.integers(0, cut.total - 1)), data.draw(st.integers(0, cut.size - 1))
    twice = again in positions(cut, rank)
    if not twice and cut.total == 1:
        return  # then all positions have a copy more
    held = list(cut.held)
    held[rank] = (*held[rank], (again, again + 1))
    with pytest.raises(LayoutError):
        Layout({"out": cut.total, "in": 2}, (Cut("tp", "out", tuple(held)),))


def test_a_rank_that_holds_all_twice_is_refused() -> None:
    with pytest.raises(LayoutError, match="twice"):
        Cut("tp", "out", (((0, 4), (0, 4)),)).check()


@pytest.mark.parametrize("interval", [(2, 2), (3, 1), (-1, 3)])
def test_what_is_no_interval_is_refused(interval: tuple[int, int]) -> None:
    with pytest.raises(LayoutError, match="not an interval"):
        Cut("tp", "out", ((interval, (0, 4)),)).check()


def test_a_cut_without_a_rank_is_refused() -> None:
    with pytest.raises(LayoutError):
        Layout({"out": 4, "in": 2}, (Cut("tp", "out", ()),))
