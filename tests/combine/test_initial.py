"""An adapter whose start was taken out of the base weights, as plain LoRA for the base model that everybody has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorica
from lorica.combine.initial import Kind, without_start
from lorica.errors import AdapterError, CheckpointError
from mixtures import STACKS, moe
from models import MLP, floats, ids, tiny_llama, transformers_conv1d


def train(model: Any, inputs: Tensor) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def output(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = model.eval()(inputs)
    return (out if isinstance(out, Tensor) else out.logits).double()


def converted(base: nn.Module, config: lorica.LoraConfig, inputs: Tensor, folder: Path) -> tuple[Tensor, Any]:
    """Train an adapter, convert it while saving, and load it into a base model that nothing was taken out of."""
    torch.manual_seed(2)
    model = lorica.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(folder / "initial")
    train(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "initial"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].r == config.r
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), folder / "plain")
    return output(model, inputs), loaded


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 5}},
    "patterns, rslora": {"use_rslora": True, "rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 5}},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", True])
@pytest.mark.parametrize("kind", FIELDS)
def test_the_converted_adapter_is_the_trained_one(kind: str, init: Any, tmp_path: Path):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], "init_lora_weights": init, **FIELDS[kind]}
    wanted, loaded = converted(MLP(), lorica.LoraConfig(**fields), floats(3, 10), tmp_path)
    assert torch.allclose(output(loaded, floats(3, 10)), wanted, atol=2e-5)
    config = loaded.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (8, True)


BASES: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "conv1d": (lambda: nn.Sequential(transformers_conv1d(10, 12)), floats(2, 12), {"target_modules": ["0"]}),
    "embedding": (tiny_llama, ids(2, 5), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied": (
        lambda: tiny_llama(tied=True),
        ids(2, 5),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "experts": (lambda: moe(), ids(2, 5), {"target_modules": ["q_proj"], "target_parameters": STACKS}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", BASES)
def test_other_layers(name: str, tmp_path: Path):
    build, inputs, fields = BASES[name]
    torch.manual_seed(0)
    config = lorica.LoraConfig(r=2, lora_alpha=3, init_lora_weights="olora" if name != "tied" else True, **fields)
    config.fan_in_fan_out = name == "conv1d"
    wanted, loaded = converted(build(), config, inputs, tmp_path)
    close = (output(loaded, inputs) - wanted).norm() / wanted.norm()
    assert float(close) < 2e-5


@pytest.mark.filterwarnings("ignore:`path_initial_model_for_weight_conversion` only works")
def test_groups_of_a_convolution_are_interleaved(tmp_path: Path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2))
    config = lorica.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = lorica.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "initial")
    x = floats(2, 4, 9)
    start = output(model, x) - output(base, x)
    train(model, x)
    wanted = output(model, x) - start
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    assert torch.allclose(output(loaded, x), wanted, atol=1e-5)


def test_the_same_through_an_adapter_in_the_model(tmp_path: Path):
    config = lorica.LoraConfig(r=4, target_modules=["lin0"], init_lora_weights="pissa")
    model = lorica.get_peft_model(MLP(), config)
    model.save_pretrained(tmp_path / "initial")
    plain = lorica.LoraConfig(r=4, target_modules=["lin0"])
    model.add_adapter("initial", plain)
    start = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    lorica.set_peft_model_state_dict(model, start, adapter_name="initial")
    train(model, floats(3, 10))
    trained = lorica.get_peft_model_state_dict(model)
    found = model.subtract_mutated_init(trained, "initial")
    model.save_pretrained(
        tmp_path / "plain",
        selected_adapters=["default"],
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    written = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) for name in found)


def test_what_is_no_start_of_the_adapter_is_refused(tmp_path: Path):
    model = lorica.get_peft_model(MLP(), lorica.LoraConfig(r=4, target_modules=["lin0"], init_lora_weights="pissa"))
    other = lorica.get_peft_model(MLP(), lorica.LoraConfig(r=3, target_modules=["lin0"]))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"the initial adapter has \(3, 10\) for .*lin0.lora_A.weight"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "other"))
    with pytest.raises(CheckpointError):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "none"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_ordinary_start_gives_a_warning(tmp_path: Path):
    config = lorica.LoraConfig(r=4, target_modules=["lin0"], init_lora_weights="gaussian")
    model = lorica.get_peft_model(MLP(), config)
    model.save_pretrained(tmp_path / "initial")
    with pytest.warns(UserWarning, match="only works for converting a PiSSA"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_variants_with_more_than_two_factors_are_refused(tmp_path: Path):
    if "kasa_config" not in lorica.variants.VARIANTS:
        pytest.skip("not registered")
    config = lorica.LoraConfig(r=4, target_modules=["lin0"], kasa_config=lorica.config.KasaConfig())
    model = lorica.get_peft_model(MLP(), config)
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(AdapterError, match="kasa_config: the delta is more than B·A"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_experts_lie_in_files_as_peft_has_them():
    a, b = Kind(("expert", "rank", "in"), 2), Kind(("expert", "out", "rank"), 2)
    trained = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(20.0).view(5, 4)}
    initial = {name: tensor + 100 for name, tensor in trained.items()}
    found = without_start(trained, initial, {"a": a, "b": b})
    live_a, live_b = found["a"].view(2, 4, 3), found["b"].view(5, 4, 2).permute(2, 0, 1)
    old_a, old_b = trained["a"].view(2, 2, 3), trained["b"].view(5, 2, 2).permute(2, 0, 1)
    start_a, start_b = old_a + 100, old_b + 100
    assert torch.equal(live_b @ live_a, old_b @ old_a - start_b @ start_a)
