"""``add_adapter``, ``load_adapter`` and the like of transformers' models adapt by lorica, given its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="the comparison is with peft")

import peft
import real

import lorica
import models
from lorica.compat.peft import take_over
from lorica.compat.peft.tuners.lora.layer import Linear, LoraLayer

pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def taken_over() -> Iterator[None]:
    take_over()
    yield
    take_over(False)


def logits(model: Any) -> torch.Tensor:
    return models.logits(model.eval(), models.ids(2, 7))


def added(name: str, **fields: Any) -> Any:
    model = models.tiny_llama()
    model.add_adapter(real.library(name).LoraConfig(**{**FIELDS, **fields}))
    return models.randomise(model)


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lorica.layers.LoraLayer)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [1, 3]},
    ],
    ids=["lora", "dora", "modules_to_save", "embedding", "tokens"],
)
def test_an_added_adapter_computes_and_is_saved_as_with_peft(tmp_path, fields):
    theirs, ours = (added(name, **fields) for name in real.LIBRARIES)
    assert layers(ours)
    assert not layers(theirs)
    torch.testing.assert_close(logits(ours), logits(theirs))
    live = {key for key, p in ours.named_parameters() if p.requires_grad}
    assert live == {key for key, p in theirs.named_parameters() if p.requires_grad}
    for name, model in zip(real.LIBRARIES, (theirs, ours), strict=True):
        model.save_pretrained(tmp_path / name)
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in reversed(real.LIBRARIES))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())
    read = lorica.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / real.LIBRARIES[1])
    torch.testing.assert_close(logits(read), logits(ours))


def test_adapters_are_switched():
    results = {}
    for name in real.LIBRARIES:
        lib = real.library(name)
        model = models.tiny_llama()
        plain = logits(model)
        model.add_adapter(lib.LoraConfig(**FIELDS), adapter_name="first")
        model.add_adapter(lib.LoraConfig(**{**FIELDS, "r": 2}), adapter_name="second")
        models.randomise(model)
        assert model.active_adapters() == ["second"]
        seen = [logits(model)]
        model.set_adapter("first")
        assert model.active_adapters() == ["first"]
        assert all(p.requires_grad == (".first." in key) for key, p in model.named_parameters() if "lora_" in key)
        seen.append(logits(model))
        model.set_adapter(["first", "second"])
        seen.append(logits(model))
        model.disable_adapters()
        assert torch.equal(logits(model), plain)
        model.enable_adapters()
        seen.append(logits(model))
        model.delete_adapter("second")
        assert list(model.peft_config) == ["first"]
        model.set_adapter("first")
        seen.append(logits(model))
        with pytest.raises(ValueError, match="not found"):
            model.set_adapter("second")
        results[name] = seen
    for ours, theirs in zip(results["lorica.compat.peft"], results["peft"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_deleting_the_last_adapter_gives_the_plain_model_back():
    model = added("lorica.compat.peft")
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(models.tiny_llama()))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("writer", real.LIBRARIES)
def test_a_saved_adapter_is_loaded_with_our_configuration(tmp_path, writer):
    lib = real.library(writer)
    model = models.randomise(
        lib.get_peft_model(models.tiny_llama(), lib.LoraConfig(**FIELDS, modules_to_save=["norm"]))
    )
    model.save_pretrained(tmp_path)
    loaded = models.tiny_llama()
    config = real.library("lorica.compat.peft").PeftConfig.from_pretrained(tmp_path)
    loaded.load_adapter(str(tmp_path), peft_config=config)
    assert len(layers(loaded)) == 4
    assert all(type(layer) is Linear for layer in layers(loaded))
    assert not any(p.requires_grad for key, p in loaded.named_parameters() if "lora_" in key)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_weights_are_swapped_in_place(tmp_path):
    lib = real.library("lorica.compat.peft")
    for name, seed in (("one", 3), ("two", 4)):
        model = models.randomise(lib.get_peft_model(models.tiny_llama(), lib.LoraConfig(**FIELDS)), seed=seed)
        model.save_pretrained(tmp_path / name)
    loaded = models.tiny_llama()
    config = lib.PeftConfig.from_pretrained(tmp_path / "one")
    loaded.load_adapter(str(tmp_path / "one"), adapter_name="default", peft_config=config)
    before = layers(loaded)
    loaded.load_adapter(str(tmp_path / "two"), adapter_name="default", peft_config=config, hotswap=True)
    assert layers(loaded) == before
    torch.testing.assert_close(logits(loaded), logits(model))


def test_pipelines_write_the_same():
    """A pipeline asks for the name of the class."""
    from transformers import pipeline

    written = {}
    for name in real.LIBRARIES:
        lib = real.library(name)
        model = lib.get_peft_model(real.demo_model(), lib.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        models.randomise(model, scale=0.05)
        writer = pipeline("text-generation", model=model, tokenizer=real.tokenizer())
        (row,) = real.demo_rows(1)
        written[name] = writer(row["prompt"], max_new_tokens=12, do_sample=False)
    assert written["lorica.compat.peft"] == written["peft"]


def test_without_taking_over_a_path_is_loaded_by_peft(tmp_path):
    added("lorica.compat.peft").save_pretrained(tmp_path)
    loaded = models.tiny_llama()
    loaded.load_adapter(str(tmp_path))
    assert not layers(loaded)


def test_after_taking_over_what_calls_peft_itself_adapts_by_lorica(tmp_path, taken_over):
    model = added("lorica.compat.peft")
    model.save_pretrained(tmp_path)
    loaded = models.tiny_llama()
    loaded.load_adapter(str(tmp_path), adapter_name="other")
    assert layers(loaded)
    torch.testing.assert_close(logits(loaded), logits(model))

    wrapped = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(**FIELDS, task_type="CAUSAL_LM"))
    assert isinstance(wrapped, real.library("lorica.compat.peft").PeftModelForCausalLM)
    assert wrapped.peft_config["default"].r == 4
    read = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    assert isinstance(read, real.library("lorica.compat.peft").PeftModel)
    torch.testing.assert_close(logits(read), logits(model))

    other = peft.get_peft_model(models.mlp(), peft.IA3Config(target_modules=["lin0"], feedforward_modules=["lin0"]))
    assert not isinstance(other, lorica.PeftModel)
    assert not layers(other)


def test_given_back_peft_is_what_it_was(taken_over):
    take_over(False)
    wrapped = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(**FIELDS))
    assert type(wrapped) is peft.PeftModel
    assert not layers(wrapped)


def test_a_whole_model_with_its_adapter_is_loaded_by_its_path(tmp_path, taken_over):
    """``AutoModel`` reads the base model's place from the adapter's configuration."""
    from transformers import AutoModelForCausalLM

    models.tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lib = real.library("lorica.compat.peft")
    model = models.randomise(lib.get_peft_model(base, lib.LoraConfig(**FIELDS)))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert layers(loaded)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_layers_know_where_they_are():
    """What transformers asks each adapted module."""
    model = added("lorica.compat.peft", modules_to_save=["lm_head"])
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    assert isinstance(layer, LoraLayer)
    assert isinstance(model.lm_head, peft.utils.ModulesToSaveWrapper)
    assert model.lm_head.active_adapter == "default"
    assert model.lm_head.adapter_state_dict_load_map("default") == {"weight": "modules_to_save.default.weight"}
    assert model.lm_head.adapter_state_dict_load_map("other") == {}
    layer.enable_adapters(False)
    assert model.lm_head.disable_adapters
    assert torch.equal(logits(model), logits(models.tiny_llama()))
