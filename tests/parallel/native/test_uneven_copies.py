"""Queries, keys and values fused into one weight with one adapter, on more ranks than there are key/value heads."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from test_parallelize import close, make, tp

from lorica import LoraConfig, get_peft_model
from lorica.errors import LayoutError
from lorica.layout import Layout, grouped_heads
from lorica.parallel import get_total_norm, parallelize, sum_gradients

SIZES = {"out": 32, "in": 4}


def fused() -> Any:
    return grouped_heads(8, 8, 4).qkv_cut("tp", 2)


def test_rows_on_different_numbers_of_ranks_are_named() -> None:
    layout = Layout(SIZES, (fused(),), groups=(16, 8, 8))
    assert Layout.from_dict(layout.to_dict()) == layout
    assert fused().counted(5) == [(0, 2, 1), (2, 4, 2), (4, 6, 2)]
    with pytest.raises(LayoutError, match="some of 'out' is held by 1 ranks, some by 2"):
        Layout(SIZES, (fused(),))
    with pytest.raises(LayoutError, match="some of 'out' is held by 1 ranks, some by 2"):
        Layout(SIZES, (fused(),), groups=(20, 12))
    with pytest.raises(LayoutError, match="do not add up"):
        Layout(SIZES, (fused(),), groups=(16, 8))


def one_adapter(sequence_parallel: bool) -> list[str]:
    found: list[dict[str, Any]] = []
    norms = []
    ids = torch.randint(3, 51, (2, 7))
    for cut in (False, True):
        base = make("Phi3")
        if cut:
            parallelize(base, tp(), sequence_parallel=sequence_parallel)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["qkv_proj", "o_proj", "gate_up_proj"], init_lora_weights=False)
        model = get_peft_model(base, config)
        model(input_ids=ids, labels=ids).loss.backward()
        sum_gradients(model)
        norms.append([get_total_norm(model), get_total_norm(model, 1.0), get_total_norm(model, float("inf"))])
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    close(torch.stack(norms[1]), torch.stack(norms[0]), "norms of orders 2, 1 and infinity")
    same = [name for name in found[0] if found[0][name].shape == found[1][name].shape]
    for name in same:
        close(found[1][name], found[0][name], name)
    return same


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, True), (8, False)])
def test_one_adapter_of_a_fused_weight(size: int, sequence_parallel: bool) -> None:
    same = ranks.run(size, one_adapter, sequence_parallel)[0]
    assert len([name for name in same if "qkv_proj.lora_A" in name]) == 2
