"""Tensors that somebody gives by hand are refused as those of a file are, with the name, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doors import refused
from good_adapter import write_good
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorica
import models
from lorica.compat import peft

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return spoil


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (_with(float("nan")), "holds NaN or infinity"),
    "infinity": (_with(float("inf")), "holds NaN or infinity"),
    "minus infinity": (_with(-float("inf")), "holds NaN or infinity"),
    "too large": (lambda tensor: tensor.double() * 1e300, "holds NaN or infinity"),
    "complex64": (lambda tensor: tensor.to(torch.complex64), "holds torch.complex64"),
    "int64": (Tensor.long, "holds torch.int64"),
    "uint8": (Tensor.byte, "holds torch.uint8"),
    "bool": (Tensor.bool, "holds torch.bool"),
    "another shape": (lambda tensor: tensor[:-1], "shape"),
}
WAYS: dict[str, Callable[[torch.nn.Module, dict[str, Tensor]], object]] = {
    "lorica": lorica.set_peft_model_state_dict,
    "peft": peft.set_peft_model_state_dict,
    "strict": lambda model, state: lorica.set_peft_model_state_dict(model, state, strict=True),
    "swap": lambda model, state: lorica.hotswap_adapter_from_state_dict(
        model, state, "default", model.peft_config["default"]
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_file_may_not_hold_is_refused(wrong: str, way: str, tmp_path: Path) -> None:
    write_good(tmp_path / "good")
    model = lorica.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "good")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoil, says = WRONG[wrong]
    given = {name: tensor + 1 for name, tensor in lorica.get_peft_model_state_dict(model).items()}
    WAYS[way](model, lorica.get_peft_model_state_dict(model))  # as it is, it is taken
    given[NAME] = spoil(given[NAME])
    refused(lambda: WAYS[way](model, given), "q_proj.lora_B", says)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_numbers_as_large_as_float32_has_are_taken_from_float64(tmp_path: Path) -> None:
    write_good(tmp_path / "good")
    model = lorica.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "good")
    state = {name: torch.full_like(t, 3e38).double() for name, t in lorica.get_peft_model_state_dict(model).items()}
    lorica.set_peft_model_state_dict(model, state)
    found = lorica.get_peft_model_state_dict(model)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["default", "second"])
def test_whole_numbers_are_no_weights_of_a_module_that_was_saved(name: str, tmp_path: Path) -> None:
    config = lorica.LoraConfig(target_modules=["lin0"], modules_to_save=["head"])
    model = lorica.get_peft_model(models.mlp(), config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.head.weight": tensors["base_model.model.head.weight"].long()}, file)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused(lambda: model.load_adapter(tmp_path, name), str(file), "head.weight holds torch.int64")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
