"""Factors that were loaded are the model's own: independent of the file, of each other, and fit for training."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.checkpoint.walk import base_parameters, live_modules
from lorica.errors import CheckpointError
from models import embedding_net, ids, mlp, randomise

BATCH = torch.linspace(-1, 1, 30).view(3, 10)
FILE = "adapter_model.safetensors"
CONFIG = {"target_modules": ["lin0", "lin1"], "r": 4, "modules_to_save": ["head"]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    randomise(lorica.get_peft_model(mlp(), lorica.LoraConfig(**CONFIG))).save_pretrained(tmp_path)
    return tmp_path


def first(folder: Path, *, low: bool) -> nn.Module:
    return lorica.PeftModel.from_pretrained(mlp(), folder, low_cpu_mem_usage=low, is_trainable=True)


def further(folder: Path, *, low: bool) -> nn.Module:
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"]))
    model.load_adapter(folder, "second", is_trainable=True, low_cpu_mem_usage=low)
    model.set_adapter("second")
    return model


def lenient(folder: Path, *, low: bool) -> nn.Module:
    return lorica.PeftModel.from_pretrained(mlp(), folder, low_cpu_mem_usage=low, strict=False, is_trainable=True)


def again(folder: Path, *, low: bool) -> nn.Module:
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(**CONFIG))
    model.load_adapter(folder, "default", is_trainable=True, low_cpu_mem_usage=low)
    return model


WAYS = [first, further, lenient, again]
HAPPENINGS = {
    "removed": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, 10),
    "written over": lambda path: path.write_bytes(b"\x7f" * path.stat().st_size),
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(found) == 6
    return found


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("happens", HAPPENINGS)
@pytest.mark.parametrize("way", WAYS)
def test_what_happens_to_the_file_later_is_no_concern_of_the_model(way, happens, low, saved):
    model = way(saved, low=low).eval()
    before = model(BATCH)
    HAPPENINGS[happens](saved / FILE)
    assert torch.equal(model(BATCH), before)


@pytest.mark.parametrize("way", WAYS)
def test_training_in_place_leaves_the_file_alone(way, saved):
    bytes_before = (saved / FILE).read_bytes()
    model = way(saved, low=True).train()
    values = [parameter.detach().clone() for parameter in trained(model)]
    optimiser = torch.optim.AdamW(trained(model), lr=0.1)
    model(BATCH).square().sum().backward()
    optimiser.step()
    assert all(not torch.equal(new, old) for new, old in zip(trained(model), values, strict=True))
    assert (saved / FILE).read_bytes() == bytes_before


@pytest.mark.parametrize("way", WAYS)
def test_factors_are_stepped_within_the_backward_pass(way, saved):
    """The factors share a block of memory; did they share a version, the steps of some would be errors of others."""
    model = way(saved, low=True).train()

    def step(parameter: Tensor) -> None:
        parameter.data.add_(parameter.grad, alpha=-0.1)
        with torch.no_grad():
            parameter.mul_(1.0)

    for parameter in trained(model):
        parameter.register_post_accumulate_grad_hook(step)
    model(BATCH).square().sum().backward()


@pytest.mark.parametrize("way", WAYS)
def test_nobody_takes_loaded_factors_for_tied(way, saved):
    parameters = trained(way(saved, low=True))
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == len(parameters)
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters)


def test_loading_again_writes_into_the_tensors_that_optimisers_hold(saved):
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(**CONFIG))
    held = trained(model)
    places = [parameter.data_ptr() for parameter in held]
    model.load_adapter(saved, "default")
    now = [p for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n]
    assert [id(parameter) for parameter in now] == [id(parameter) for parameter in held]
    assert [parameter.data_ptr() for parameter in now] == places
    assert torch.equal(model.eval()(BATCH), first(saved, low=False).eval()(BATCH))


def test_embeddings_and_heads_of_the_base_model_come_back_into_their_tensors(tmp_path):
    config = lorica.LoraConfig(target_modules=["emb", "head"])
    model = randomise(lorica.get_peft_model(embedding_net(), config))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = lorica.PeftModel.from_pretrained(embedding_net(), tmp_path)
    assert torch.equal(loaded.eval()(ids(2, 5)), model.eval()(ids(2, 5)))


def test_a_failed_load_gives_back_what_trained(saved):
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"], bias="all"))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(flags.values())
    os.truncate(saved / FILE, 100)
    base = model.get_base_model()
    for load in (model.load_adapter, partial(lorica.PeftModel.from_pretrained, base)):
        with pytest.raises(CheckpointError):
            load(saved, adapter_name="second")
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_the_walk_is_the_same_however_many_adapters_there_are():
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(**CONFIG))
    base = [id(parameter) for parameter in mlp().parameters()]
    walked = [name for name, _ in live_modules(model)]
    assert walked == [name for name, _ in model.named_modules() if name in set(walked)]
    for name in "ab":
        model.add_adapter(name, lorica.LoraConfig(target_modules=["lin0", "lin1"]))
    assert [name for name, _ in live_modules(model)] == walked
    assert len(base_parameters(model)) == len(base)
    assert len(base_parameters(copy.deepcopy(model))) == len(base)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tensors_given_by_hand_are_looked_at_as_those_of_a_file(value, saved):
    model = first(saved, low=False)
    state = lorica.get_peft_model_state_dict(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    name = "base_model.model.lin1.lora_A.weight"
    given = {key: tensor + 1 for key, tensor in before.items()}
    given[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        lorica.set_peft_model_state_dict(model, given)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())


def test_the_largest_numbers_are_taken(saved):
    """Their norm, by which tensors are looked at together, is infinite."""
    model = first(saved, low=False)
    given = {name: torch.full_like(t, 3e38) for name, t in lorica.get_peft_model_state_dict(model).items()}
    lorica.set_peft_model_state_dict(model, given)
    assert all(torch.equal(t, given[name]) for name, t in lorica.get_peft_model_state_dict(model).items())


def test_weights_trained_with_another_scale_are_told_of_and_taken(saved: Path) -> None:
    """Over an adapter that is there; its configuration stays."""
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(**CONFIG, lora_alpha=32, alpha_pattern={"lin1": 3}))
    with pytest.warns(UserWarning, match=r"adapter_config\.json: lora_alpha is 8 there, 32 here, or alpha_pattern is"):
        model.load_adapter(saved, "default")
    assert model.peft_config["default"].lora_alpha == 32
    (saved / "adapter_config.json").unlink()
    model.load_adapter(saved, "default")  # nothing to compare with
