"""LoftQ on a model that is quantised already: nearer to the unquantised one, and back where a callback says no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorica
import models
from lorica.errors import AdapterError, CheckpointError, ConfigError

bitsandbytes = pytest.importorskip("bitsandbytes")


def quantised(kind: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A model of two layers as it was, and quantised with an adapter; the first is in a file too."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    save_file(plain.state_dict(), folder / "model.safetensors")
    if kind == "nf4":
        layers = [bitsandbytes.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32) for i, o in SIZES]
    else:
        layers = [bitsandbytes.nn.Linear8bitLt(i, o, has_fp16_weights=False) for i, o in SIZES]
    packed = nn.Sequential(*layers)
    packed.load_state_dict(plain.state_dict())
    config = lorica.LoraConfig(r=8, lora_alpha=16, target_modules=["0", "1"])
    return plain, lorica.get_peft_model(packed.to("cpu"), config)


SIZES = [(64, 128), (128, 64)]


def missing(plain: nn.Module, model: nn.Module, index: int) -> float:
    """How far a layer's weight with its factors is from what it was."""
    layer: Any = model.base_model.model[index]
    now = layer.base_weight + layer.get_delta_weight("default")
    return float((plain[index].weight - now).detach().norm())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_factors_are_nearest_to_what_was_lost(kind: str, tmp_path: Path) -> None:
    plain, model = quantised(kind, tmp_path)
    before = [missing(plain, model, index) for index in range(2)]
    lorica.replace_lora_weights_loftq(model, tmp_path)
    for index in range(2):
        lost = plain[index].weight.detach() - model.base_model.model[index].base_weight
        best = float(torch.linalg.svdvals(lost.double())[8:].norm())
        assert missing(plain, model, index) == pytest.approx(best, rel=1e-3)
        assert missing(plain, model, index) < before[index]


def test_a_layer_gets_its_factors_back_where_the_callback_says_no(tmp_path: Path) -> None:
    _, model = quantised("nf4", tmp_path)
    models.randomise(model)
    before = {name: tensor.clone() for name, tensor in lorica.get_peft_model_state_dict(model).items()}
    asked: list[tuple[bool, str]] = []

    def only_the_second(given: nn.Module, name: str) -> bool:
        asked.append((given is model, name))
        return name == "1"

    lorica.replace_lora_weights_loftq(model, tmp_path / "model.safetensors", callback=only_the_second)
    assert asked == [(True, "0"), (True, "1")]
    after = lorica.get_peft_model_state_dict(model)
    assert {name.split(".")[2] for name, tensor in after.items() if not torch.equal(tensor, before[name])} == {"1"}


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    plain, model = quantised("nf4", tmp_path)
    with pytest.raises(CheckpointError, match="pass the model_path"):
        lorica.replace_lora_weights_loftq(model)
    with pytest.raises(CheckpointError, match="safetensors file of the model"):
        lorica.replace_lora_weights_loftq(model, tmp_path / "nowhere")
    save_file({"0.weight": plain[0].weight.detach()[:4].clone()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"0.weight has the shape \(4, 64\)"):
        lorica.replace_lora_weights_loftq(model, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match="'other' does not exist"):
        lorica.replace_lora_weights_loftq(model, tmp_path, "other")
    whole = lorica.get_peft_model(plain, lorica.LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="No bnb LoRA module found"):
        lorica.replace_lora_weights_loftq(whole, tmp_path)
