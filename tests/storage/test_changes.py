"""A change is worked out first and made later; what was made is noted, also where another one fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorica
from lorica.layers.rewrites import Rewrite, carry_out
from lorica.storage import Room, Term, add_low_rank_, change_of, storage_of

ROWS, COLS, R = 37, 24, 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, ROWS])
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("lead", [(), (4,)], ids=["matrix", "stack"])
def test_a_change_made_later_is_the_change_made_at_once(monkeypatch, dtype, factors, rows, undo, lead):
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", rows * COLS)
    weight = torch.randn(*lead, ROWS, COLS).to(dtype)
    gain = None if lead else torch.rand(ROWS, 1) + 0.5
    terms = [
        Term(torch.randn(*lead, ROWS, R).to(factors), torch.randn(*lead, R, COLS).to(factors), 0.5 + index, gain)
        for index in range(2)
    ]
    before, at_once = weight.clone(), weight.clone()
    add_low_rank_(at_once, terms, storage_of(weight, "here"), undo=undo)
    change = change_of(weight, terms, storage_of(weight, "here"), undo=undo)
    assert torch.equal(weight, before), "working a change out writes nothing"
    change(Room())
    assert torch.equal(weight, at_once)
    assert not torch.equal(weight, before)


def adapted(dtype: torch.dtype) -> lorica.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(COLS, COLS), nn.Linear(COLS, COLS), nn.Linear(COLS, COLS)).to(dtype)
    model = lorica.get_peft_model(base, lorica.LoraConfig(r=R, target_modules=["0", "1", "2"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def weights(model: lorica.PeftModel) -> list[torch.Tensor]:
    return [layer.base_layer.weight.detach().clone() for layer in model.base_model.model]


@pytest.mark.parametrize("merging", [True, False])
def test_where_a_weight_cannot_be_written_the_earlier_ones_are_known_to_be(monkeypatch, merging):
    model = adapted(torch.float32)
    plain, layers = weights(model), list(model.base_model.model)
    whole = copy.deepcopy(model)
    whole.merge_adapter()
    merged = weights(whole)
    if not merging:
        model.merge_adapter()
    ready = "ready_to_merge" if merging else "ready_to_unmerge"
    monkeypatch.setattr(layers[1], ready, lambda *args, **options: Rewrite(fail, lambda: None))
    with pytest.raises(MemoryError, match="no more"):
        model.merge_adapter() if merging else model.unmerge_adapter()
    monkeypatch.undo()
    states = [bool(layer.merged_adapters) for layer in layers]
    assert states == ([True, False, False] if merging else [False, True, True])
    for found, state, with_delta, without in zip(weights(model), states, merged, plain, strict=True):
        torch.testing.assert_close(found, with_delta if state else without)
    if merging:
        model.merge_adapter()  # those that are not merged yet
        for found, wanted in zip(weights(model), merged, strict=True):
            torch.testing.assert_close(found, wanted)
    else:
        model.unmerge_adapter()
        for found, wanted in zip(weights(model), plain, strict=True):
            torch.testing.assert_close(found, wanted)


def fail(room: Room | None) -> None:
    raise MemoryError("no more")


def test_nothing_is_noted_before_all_weights_are_written():
    seen: list[str] = []
    carry_out(
        Rewrite(lambda room, name=name: seen.append(f"write {name}"), lambda name=name: seen.append(f"note {name}"))
        for name in "ab"
    )
    assert seen == ["write a", "write b", "note a", "note b"]
