"""Slices, boxes, reductions and parts of any layout, against position lists; and layouts as data."""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from drawn import ROLES, law, layouts, numbered, place_of, ranks, shape_of
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import LayoutError
from lorica.layout import Cut, Layout, Roles, even

some_roles = st.sampled_from(ROLES)


@law
@given(layouts(), some_roles)
def test_take_holds_the_positions(layout: Layout, roles: Roles) -> None:
    shape = shape_of(layout, roles)
    logical = numbered(shape)
    for at in ranks(layout):
        expected = logical
        for dim, (role, length) in enumerate(zip(roles, shape, strict=True)):
            expected = expected.index_select(dim, torch.tensor(place_of(layout, role, length, at), dtype=torch.long))
        local = layout.take(logical, roles, at)
        assert torch.equal(local, expected)
        assert local.shape == layout.local_shape(roles, shape, at)
        assert local.is_contiguous()
        assert local.untyped_storage().data_ptr() != logical.untyped_storage().data_ptr() or not local.numel()


@law
@given(layouts(), some_roles)
def test_boxes_tile_what_is_held(layout: Layout, roles: Roles) -> None:
    """Local boxes cover the local tensor once; read from the logical tensor they give what take gives."""
    shape = shape_of(layout, roles)
    logical = numbered(shape)
    for at in ranks(layout):
        local = torch.zeros(layout.local_shape(roles, shape, at), dtype=torch.long)
        touched = torch.zeros_like(local)
        for box in layout.boxes(roles, shape, at):
            assert logical[box.logical].numel() > 0
            local[box.local] = logical[box.logical]
            touched[box.local] += 1
        assert torch.equal(local, layout.take(logical, roles, at))
        assert bool((touched == 1).all())


@law
@given(layouts(), some_roles)
def test_assemble_undoes_take(layout: Layout, roles: Roles) -> None:
    logical = numbered(shape_of(layout, roles))
    held = [(at, layout.take(logical, roles, at)) for at in ranks(layout)]
    assert torch.equal(layout.assemble(logical.shape, roles, held), logical)
    assert torch.equal(layout.assemble(logical.shape, roles, reversed(held)), logical)


@law
@given(layouts(), some_roles)
def test_copies_count_the_ranks_that_hold_an_element(layout: Layout, roles: Roles) -> None:
    shape = shape_of(layout, roles)
    count, shared = torch.zeros(shape, dtype=torch.long), 1
    for cut in layout.cuts:
        shared *= 1 if cut.dim in roles else cut.size
    for at in ranks(layout):
        for box in layout.boxes(roles, shape, at):
            count[box.logical] += 1
    assert bool((count == layout.copies(roles) * shared).all())


@law
@given(layouts(), some_roles)
def test_sharded_and_summed(layout: Layout, roles: Roles) -> None:
    """Sharded: ranks along the axis hold different things. Summed: every axis along which another rank has a share
    of the gradient, because it has other rows, columns, experts or tokens of the same factor."""
    sharded = {cut.axis for cut in layout.cuts if cut.dim in roles}
    partial = {cut.axis for cut in layout.cuts if cut.dim not in roles or cut.copies > 1}
    assert sorted(layout.sharded(roles)) == sorted(sharded)
    assert set(layout.summed(roles)) == partial | (set(layout.sequence) - sharded)
    assert len(set(layout.summed(roles))) == len(layout.summed(roles))
    assert layout.averaged() == layout.data
    columns = layout.cut_of("in")
    assert layout.shares() == (1 if columns is None or columns.axis in layout.sequence else columns.size)


@law
@given(layouts())
def test_parts(layout: Layout) -> None:
    """A part is cut as it lies in the fused weight: its rows are those that part_rows names, in the same order."""
    logical = numbered(shape_of(layout, ("out", "in")))
    assert len(layout.part_bounds()) == len(layout.parts)
    for at in ranks(layout):
        local, seen = layout.take(logical, ("out", "in"), at), Counter[int]()
        for index, ((name, first, last), rows) in enumerate(
            zip(layout.part_bounds(), layout.part_rows(at), strict=True)
        ):
            assert (name, last - first) == layout.parts[index]
            alone = layout.part(index)
            assert alone.sizes == {**layout.sizes, "out": last - first}
            assert alone.cut_of("in") == layout.cut_of("in")
            assert (alone.sequence, alone.data, alone.parts) == (layout.sequence, layout.data, ())
            mine = [row for start, stop in rows for row in range(start, stop)]
            seen.update(mine)
            assert torch.equal(alone.take(logical[first:last], ("out", "in"), at), local[mine])
        assert not layout.parts or seen == dict.fromkeys(range(len(local)), 1)


@law
@given(layouts())
def test_as_data(layout: Layout) -> None:
    text = json.dumps(layout.to_dict())
    for again in (
        Layout.from_dict(json.loads(text)),
        Layout.from_dict(layout.to_dict()),
        pickle.loads(pickle.dumps(layout)),
        copy.deepcopy(layout),
    ):
        assert again == layout
        assert hash(again) == hash(layout)
        assert json.dumps(again.to_dict()) == text


def _damages() -> dict[str, Any]:
    def damaged(**fields: Any) -> dict[str, Any]:
        values = Layout({"out": 4, "in": 6}, (even("tp", "out", 4, 2),), (("q", 3), ("k", 1))).to_dict()
        values = json.loads(json.dumps(values))
        values.update(fields)
        return values

    cut = {"axis": "tp", "dim": "out", "held": [[[0, 2]], [[2, 4]]]}
    without = {key: value for key, value in damaged().items() if key != "sizes"}
    return {
        "not a mapping": [],
        "None": None,
        "no sizes": without,
        "sizes are a list": damaged(sizes=[4, 6]),
        "a size is no number": damaged(sizes={"out": "four", "in": 6}),
        "a size is zero": damaged(cuts=[], parts=[], sizes={"out": 0, "in": 6}),
        "a size is negative": damaged(cuts=[], parts=[], sizes={"out": 4, "in": -6}),
        "a size is another": damaged(sizes={"out": 5, "in": 6}),
        "an unknown dimension": damaged(sizes={"out": 4, "in": 6, "up": 2}, cuts=[{**cut, "dim": "up"}]),
        "a dimension without a size": damaged(cuts=[{**cut, "dim": "expert"}]),
        "a cut without its axis": damaged(cuts=[{"dim": "out", "held": []}]),
        "a cut that is text": damaged(cuts=["tp"]),
        "an interval of three": damaged(cuts=[{**cut, "held": [[[0, 2, 4]], [[2, 4]]]}]),
        "an interval that ends early": damaged(cuts=[{**cut, "held": [[[2, 0]], [[2, 4]]]}]),
        "a hole": damaged(cuts=[{**cut, "held": [[[0, 1]], [[2, 4]]]}]),
        "an overlap": damaged(cuts=[{**cut, "held": [[[0, 3]], [[2, 4]]]}]),
        "out cut twice": damaged(cuts=[cut, {**cut, "axis": "fsdp"}]),
        "an axis used twice": damaged(cuts=[cut, {"axis": "tp", "dim": "in", "held": [[[0, 3]], [[3, 6]]]}]),
        "copies of input columns": damaged(cuts=[{"axis": "tp", "dim": "in", "held": [[[0, 6]], [[0, 6]]]}]),
        "parts that do not add up": damaged(parts=[["q", 3], ["k", 2]]),
        "a part of nothing": damaged(parts=[["q", 4], ["k", 0]]),
        "a negative part": damaged(parts=[["q", 5], ["k", -1]]),
        "parts of one name": damaged(parts=[["q", 3], ["q", 1]]),
        "a part without a length": damaged(parts=[["q"], ["k", 1]]),
        "parts are a number": damaged(parts=4),
        "sequence is text": damaged(sequence="tp"),
        "data is a number": damaged(data=3),
    }


@pytest.mark.parametrize("damage", list(_damages()))
def test_damaged_data_is_refused(damage: str) -> None:
    with pytest.raises(LayoutError):
        Layout.from_dict(_damages()[damage])


def test_nothing_to_assemble() -> None:
    with pytest.raises(LayoutError, match="nothing"):
        Layout({"out": 4, "in": 2}).assemble((4, 2), ("out", "in"), [])


def test_layouts_are_values() -> None:
    one, other = (Layout({"out": 4, "in": 2}, (even("tp", "out", 4, 2),)) for _ in range(2))
    assert {one: 1}[other] == 1
    assert one != Layout({"out": 4, "in": 2}, (Cut("tp", "out", (((2, 4),), ((0, 2),))),))
