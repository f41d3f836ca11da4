"""The bookkeeping of rows: which items are whose, where an invocation stands, calls taken apart and put together."""

from __future__ import annotations

import pytest
import torch

from lorica.errors import AdapterError
from lorica.routing import Rows, calculate_alora_offsets, each_group, last_occurrence

CPU = torch.device("cpu")


def owners(rows: Rows, items: int) -> list[str]:
    """The adapter of each item, by every way of asking."""
    found = [""] * items
    for name, start, stop in rows.runs(items):
        found[start:stop] = [name] * (stop - start)
    for name in rows.adapters:
        here = rows.places(name, items, CPU)
        assert [found[place] for place in torch.arange(items)[here]] == [name] * found.count(name)
        assert [found[place] for place in rows.index((name,), items, CPU)] == [name] * found.count(name)
    return found


@pytest.mark.parametrize("names", ["a", "ab", "aab", "aba", "abba", "abcabc", "aaabbb"])
@pytest.mark.parametrize("each", [1, 3])
def test_items_of_a_row_stand_together(names: str, each: int) -> None:
    assert owners(Rows(list(names)), len(names) * each) == [name for name in names for _ in range(each)]


def test_the_index_of_several_adapters_has_one_after_the_other() -> None:
    assert Rows(list("abca")).index(("c", "a"), 4, CPU).tolist() == [2, 0, 3]


@pytest.mark.parametrize("items", [2, 4])
def test_items_that_the_rows_do_not_divide_are_refused(items: int) -> None:
    with pytest.raises(AdapterError, match=f"Length of `adapter_names` .* got 3 and {items}"):
        Rows(list("aba")).runs(items)


def test_the_rows_of_one_adapter_keep_their_offsets() -> None:
    rows = Rows(list("abab"), {"a": torch.tensor([4, 0, 2, 0]), "b": torch.tensor([0, 7, 0, 9])})
    only = rows.only("b")
    assert only.adapters == ["b"]
    assert {name: offsets.tolist() for name, offsets in only.offsets.items()} == {"b": [7, 9]}
    assert only.runs(6) == [("b", 0, 6)]
    assert rows.reach("a") == 4


@pytest.mark.parametrize(
    ("row", "offset"),
    [
        ([5, 6, 1, 1], 4),
        ([1, 5, 6, 1], 3),
        ([1, 1, 5, 6], 2),
        ([5, 6, 5, 6], 2),
        ([5, 5, 6, 6], 3),
        ([6, 5, 1, 5], 0),
        ([1, 2, 3, 4], 0),
    ],
)
def test_the_last_occurrence_counts_from_its_start_to_the_end(row: list[int], offset: int) -> None:
    assert last_occurrence(torch.tensor([row, [0] * 4]), [5, 6]).tolist() == [offset, 0]


def test_a_row_shorter_than_the_invocation_does_not_have_it() -> None:
    assert last_occurrence(torch.tensor([[5]]), [5, 6]).tolist() == [0]


def test_offsets_by_the_adapter_of_each_row() -> None:
    class Config:
        def __init__(self, tokens: list[int] | None) -> None:
            self.alora_invocation_tokens = tokens

    configs = {"five": Config([5]), "six": Config([6]), "plain": Config(None)}
    ids = torch.tensor([[5, 6, 0]]).repeat(5, 1)
    names = ["five", "six", "plain", "__base__", "five"]
    assert calculate_alora_offsets(configs, "six", ids, names) == [3, 2, None, None, 3]
    assert calculate_alora_offsets(configs, "six", ids) == [2] * 5
    with pytest.warns(UserWarning, match="Adapter 'seven' not found in peft_config. Using base model for row 1."):
        assert calculate_alora_offsets(configs, "six", ids[:2], ["five", "seven"]) == [3, None]


def test_calls_of_each_group_are_put_together_in_the_order_of_the_batch() -> None:
    rows, calls = Rows(list("abcab")), []

    def call(name: str, x: torch.Tensor, *, whole: torch.Tensor, scale: int) -> dict[str, object]:
        calls.append((name, x[:, 0].tolist()))
        assert len(whole) == 2
        return {"sum": x * ord(name) * scale, "tokens": x.flatten(), "name": "same"}

    x = torch.arange(15).view(5, 3)
    found = each_group(rows, rows.adapters, call, (x,), {"whole": torch.zeros(2), "scale": 2})
    names = torch.tensor([ord(name) for name in "abcab"]).unsqueeze(1)
    assert torch.equal(found["sum"], x * names * 2)
    assert torch.equal(found["tokens"], x.flatten())
    assert found["name"] == "same"
    assert calls == [("a", [0, 9]), ("b", [3, 12]), ("c", [6])]


def test_a_group_without_rows_is_called_and_its_output_dropped() -> None:
    rows, called = Rows(["a", "a"]), []

    def call(name: str, x: torch.Tensor) -> torch.Tensor:
        called.append((name, len(x)))
        return x + 1

    assert torch.equal(each_group(rows, ["a", "z"], call, (torch.zeros(2, 3),), {}), torch.ones(2, 3))
    assert called == [("a", 2), ("z", 1)]


def test_an_output_without_rows_cannot_be_put_together() -> None:
    rows = Rows(["a", "b"])
    with pytest.raises(AdapterError, match="has no rows of its own"):
        each_group(rows, rows.adapters, lambda name, x: x.sum(), (torch.zeros(2, 3),), {})
