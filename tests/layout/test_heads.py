"""Grouped-query attention over ranks: every order of heads computes the same attention."""

from __future__ import annotations

from collections import Counter

import pytest
from drawn import law, orders, positions
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import LayoutError
from lorica.layout import HeadOrder, Layout, even, grouped_heads


def test_neuronx_distributeds_table() -> None:
    """T = 8, K = 4, H = 32, m = 2."""
    order = grouped_heads(8, 32, 4)
    assert order.kv == ((0,), (1,), (2,), (3,), (0,), (1,), (2,), (3,))
    starts = (0, 8, 16, 24, 4, 12, 20, 28)
    assert order.query == tuple(tuple(range(start, start + 4)) for start in starts)


def test_copies_on_neighbouring_ranks() -> None:
    order = grouped_heads(8, 32, 4, order="neighbours")
    assert order.kv == ((0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,))
    assert order.query == tuple(tuple(range(4 * rank, 4 * rank + 4)) for rank in range(8))


@law
@given(orders())
def test_a_query_finds_its_key_on_its_rank(drawn: tuple[HeadOrder, int, int, int]) -> None:
    """Attention repeats each local key/value head for its share of the queries, without knowing of ranks."""
    order, heads, kv_heads, m = drawn
    for query, kv in zip(order.query, order.kv, strict=True):
        share = len(query) // len(kv)
        assert [head // (heads // kv_heads) for head in query] == [kv[place // share] for place in range(len(query))]
    assert sorted(head for held in order.query for head in held) == list(range(heads))
    assert Counter(head for held in order.kv for head in held) == dict.fromkeys(range(kv_heads), m)
    assert len({len(held) for held in order.query}) == len({len(held) for held in order.kv}) == 1


@law
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["strided", "neighbours"]))
def test_without_copies_heads_are_cut_evenly(ranks: int, slots: int, group: int, order: str) -> None:
    kv_heads = ranks * slots
    found = grouped_heads(ranks, kv_heads * group, kv_heads, order=order)  # type: ignore[arg-type]
    rows = even("tp", "out", kv_heads * group * 2, ranks)
    for rank in range(ranks):
        assert positions(found.query_cut("tp", 2), rank) == positions(rows, rank)
    assert found.kv_cut("tp", 2).copies == 1


@law
@given(orders(), st.integers(1, 3))
def test_the_cuts_of_q_k_v_and_o(drawn: tuple[HeadOrder, int, int, int], width: int) -> None:
    """Fused or apart, the parts are the same; the output projection's columns go with the queries."""
    order, heads, kv_heads, m = drawn
    query, kv = order.query_cut("tp", width), order.kv_cut("tp", width)
    output = order.query_cut("tp", width, dim="in")
    assert (query.total, query.copies, kv.total, kv.copies) == (heads * width, 1, kv_heads * width, m)
    assert (output.dim, output.held) == ("in", query.held)
    parts = (("q", heads * width), ("k", kv_heads * width), ("v", kv_heads * width))
    whole = Layout({"out": (heads + 2 * kv_heads) * width, "in": 2}, (order.qkv_cut("tp", width),), parts)
    for index, expected in enumerate((query, kv, kv)):
        alone = whole.part(index).cut_of("out")
        assert alone is not None
        assert alone.copies == expected.copies
        for rank in range(len(order.query)):
            assert positions(alone, rank) == positions(expected, rank)
            assert [place % width for place in positions(expected, rank)] == list(range(width)) * (
                len(positions(expected, rank)) // width
            )


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "multiplier"),
    [
        (2, 6, 4, None),
        (3, 8, 2, None),
        (8, 4, 2, None),
        (4, 8, 2, 3),
        (8, 8, 2, 2),
        (2, 8, 4, 0),
        (0, 8, 4, None),
        (2, 8, 0, None),
    ],
    ids=str,
)
def test_heads_that_do_not_divide(ranks: int, heads: int, kv_heads: int, multiplier: int | None) -> None:
    with pytest.raises(LayoutError):
        grouped_heads(ranks, heads, kv_heads, multiplier=multiplier)


def test_a_head_twice_on_one_rank() -> None:
    with pytest.raises(LayoutError, match="twice"):
        grouped_heads(2, 4, 2, multiplier=2, order="neighbours")
