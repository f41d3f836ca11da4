"""Modules that stand in several places, and layers that are asked in unusual ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
import models


class Twice(nn.Module):
    """One linear under two names, as models share an embedding between encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"second": self.first})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["second"](self.first(x).relu())


def test_a_module_in_two_places_is_adapted_in_both():
    base = Twice()
    config = lorica.LoraConfig(target_modules=["first"], init_lora_weights=False, r=2)
    model = lorica.get_peft_model(base, config)
    assert base.inner["second"] is base.first
    x = torch.randn(3, 6)
    adapted = model(x)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear
    assert merged.inner["second"] is merged.first
    assert torch.allclose(merged(x), adapted, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_under_autocast_the_output_has_the_base_layer_s_dtype(name):
    layer, x = {
        "linear": (nn.Linear(8, 8), torch.randn(2, 8)),
        "embedding": (nn.Embedding(9, 8), torch.arange(4)),
        "conv2d": (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6)),
    }[name]
    base = nn.Sequential(layer)
    config = lorica.LoraConfig(target_modules=["0"], init_lora_weights=False, r=2)
    with torch.autocast("cpu", torch.bfloat16):
        plain = base(x)
        model = lorica.get_peft_model(base, config)
        adapted = model(x)
    assert adapted.dtype == plain.dtype
    if name == "embedding":  # it is not narrowed, so neither is its sum with the adapter's part
        assert torch.equal(adapted, model(x))


def test_a_kernel_stored_channels_last_is_merged_in_place():
    base = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    config = lorica.LoraConfig(target_modules=["0"], init_lora_weights=False, r=2)
    model, x = lorica.get_peft_model(base, config), torch.randn(2, 3, 7, 7)
    adapted = model(x)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(x), adapted, atol=1e-5)
    assert merged[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_input_may_be_given_by_name():
    model = lorica.get_peft_model(nn.Sequential(nn.Linear(4, 4)), lorica.LoraConfig(target_modules=["0"], r=2))
    layer, x = model.base_model.model[0], torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer(x))


def test_an_adapted_layer_answers_for_its_base_layer():
    model = lorica.get_peft_model(nn.Sequential(nn.Linear(4, 6)), lorica.LoraConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    assert layer.weight is layer.base_layer.weight
    assert (layer.in_features, layer.out_features) == (4, 6)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


def test_the_scale_of_a_layer_can_be_changed_and_set_back():
    config = lorica.LoraConfig(target_modules=["0"], r=2, lora_alpha=4, init_lora_weights=False)
    model = lorica.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    layer, x = model.base_model.model[0], torch.randn(3, 4)
    part = layer(x) - layer.base_layer(x)
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 1.0
    assert torch.allclose(layer(x) - layer.base_layer(x), 0.5 * part, atol=1e-6)
    layer.scale_layer(3.0)
    layer.unscale_layer(2.0)
    assert layer.scaling["default"] == 1.5
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.set_scale("default", 1.0)
    with pytest.raises(TypeError):
        layer.scaling["default"] = 3.0


@pytest.mark.parametrize("name", ["", "a.b", "keys", "__base__", 3])
def test_an_impossible_adapter_name_is_refused(name):
    with pytest.raises(ValueError, match="adapter name"):
        lorica.get_peft_model(models.mlp(), lorica.LoraConfig(target_modules=["lin0"]), adapter_name=name)


@pytest.mark.parametrize("name", ["lora", "a", "lora_A", "weight", "default_2"])
def test_any_other_name_will_do(name, tmp_path):
    config = lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    model = lorica.get_peft_model(models.mlp(), config, adapter_name=name)
    model.save_pretrained(tmp_path)
    back = lorica.PeftModel.from_pretrained(models.mlp(), tmp_path / name, adapter_name="other")
    assert list(lorica.get_peft_model_state_dict(back, adapter_name="other")) == [
        f"base_model.model.lin0.lora_{factor}.weight" for factor in "AB"
    ]
    with pytest.raises(ValueError, match="not found"):
        lorica.get_peft_model_state_dict(back, adapter_name=name)


def test_what_is_saved_whole_is_not_adapted_too():
    """ "head" means "lm_head" among the modules to save, and what lies in such a module trains with it."""
    config = lorica.LoraConfig(target_modules=["lm_head", "q_proj"], modules_to_save=["head"])
    model = lorica.get_peft_model(models.tiny_llama(), config)
    assert type(model.get_base_model().lm_head).__name__ == "ModulesToSaveWrapper"
    assert all(name.endswith("q_proj") for name in model.targeted_module_names)
    config = lorica.LoraConfig(target_modules=["q_proj"], modules_to_save=["attn"])
    with pytest.raises(ValueError, match="All modules were excluded"):
        lorica.get_peft_model(models.tiny_llama(), config)


@pytest.mark.parametrize("saved", ["layers", "q_proj"])
def test_what_cannot_be_saved_whole_is_refused_before_anything_changes(saved):
    model = lorica.inject_adapter_in_model(lorica.LoraConfig(target_modules=["q_proj"]), models.tiny_llama())
    before = [(name, type(module)) for name, module in model.named_modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    config = lorica.LoraConfig(target_modules=["embed_tokens"], modules_to_save=[saved])
    with pytest.raises(ValueError, match="modules_to_save cannot be applied"):
        lorica.inject_adapter_in_model(config, model, adapter_name="second")
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
