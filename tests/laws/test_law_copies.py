"""Copies of an adapted model compute the same and share nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from harness import ALL_OPS, adapt, by_name
from torch import nn

import lorica
from cases import Op
from models import ids, mlp, randomise, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, by_pickle, by_torch]


def assert_independent(model: nn.Module, other: nn.Module, batch: torch.Tensor) -> None:
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, other))
    assert not mine & theirs
    expected = model(batch)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    other.merge_adapter() if hasattr(other, "merge_adapter") else None
    assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("make", COPIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", [op for op in ALL_OPS if op.mergeable], ids=by_name)
def test_every_operation(op: Op, make) -> None:
    model, batch = adapt(op.build(), op), op.inputs()
    model.add_adapter("other", op.config(lorica, r=op.ranks[-1]))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    other = make(model)
    assert type(other) is type(model)
    assert torch.equal(other(batch), model(batch))
    assert other.active_adapters == model.active_adapters
    assert list(other.state_dict()) == list(model.state_dict())
    assert {n: p.requires_grad for n, p in other.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert_independent(model, other, batch)


@pytest.mark.parametrize("make", COPIES, ids=lambda f: f.__name__)
def test_a_whole_model(make) -> None:
    config = lorica.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = lorica.get_peft_model(tiny_llama(), config).eval()
    other = make(model)
    assert torch.equal(other(ids(2, 4)).logits, model(ids(2, 4)).logits)
    assert other.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()
    assert other.peft_config["default"] is not model.peft_config["default"]
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, other))
    assert not mine & theirs
    with other.disable_adapter():
        assert not torch.equal(other(ids(2, 4)).logits, model(ids(2, 4)).logits)


@pytest.mark.parametrize("make", COPIES, ids=lambda f: f.__name__)
def test_a_merged_model(make) -> None:
    """A copy of a merged model can be unmerged without touching the original."""
    base = mlp()
    config = lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    model = lorica.get_peft_model(copy.deepcopy(base), config).eval()
    model.merge_adapter()
    merged = model.base_model.model.lin0.base_layer.weight.clone()
    other = make(model)
    other.unmerge_adapter()
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, merged)
    assert torch.allclose(other.base_model.model.lin0.base_layer.weight, base.lin0.weight, atol=1e-6)


def test_ties_survive_a_copy() -> None:
    config = lorica.LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = lorica.get_peft_model(tiny_llama(tied=True), config)

    def shared(m: nn.Module) -> int:
        return len(list(m.named_parameters(remove_duplicate=False))) - len(list(m.named_parameters()))

    assert shared(copy.deepcopy(model)) == shared(model) > 0
    assert torch.equal(copy.deepcopy(model)(ids(1, 4)).logits, model(ids(1, 4)).logits)


def test_a_config_can_be_copied_and_pickled() -> None:
    config = lorica.LoraConfig(target_modules=["lin0"], rank_pattern={"lin0": 2})
    for other in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
