"""What is adapted is looked for when somebody asks: whatever became of the model in between, nothing is out of date."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import lorica
from lorica.adapt.inject import adapted, adapter_modules, lora_layers
from lorica.layers import Factor
from lorica.layers.holders import Container, Light, begin


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.shared = self.layers[0].first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def two_adapters() -> lorica.PeftModel:
    config = lorica.LoraConfig(r=2, target_modules=["first", "second", "embed"], init_lora_weights=False)
    model = lorica.get_peft_model(Stack(), config)
    model.add_adapter("other", config)
    return model


def training(model: nn.Module) -> set[str]:
    """Names of the adapters of which some factor trains; all of them must, or none."""
    states: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            adapter = "other" if ".other" in name else "default"
            states.setdefault(adapter, set()).add(parameter.requires_grad)
    assert all(len(found) == 1 for found in states.values()), states
    return {adapter for adapter, found in states.items() if found == {True}}


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_file])
def test_a_copy_is_switched_by_itself(through):
    model = two_adapters()
    copied = through(model)
    copied.set_adapter("other")
    assert training(copied) == {"other"}
    assert training(model) == {"default"}
    copied.delete_adapter("default")
    assert {name for layer in lora_layers(model) for name in layer.specs} == {"default", "other"}
    assert not {id(layer) for layer in lora_layers(model)} & {id(layer) for layer in lora_layers(copied)}


def test_a_layer_that_somebody_else_puts_in_or_takes_out_is_seen():
    model = two_adapters()
    stack = model.get_base_model()
    gone = stack.layers[1].first
    stack.layers[1].first = nn.Linear(4, 4)
    stack.layers.append(copy.deepcopy(stack.layers[0]))
    stack.layers[3].first.switch = stack.layers[3].second.switch = gone.switch
    model.set_adapter("other")
    assert training(model) == {"other"}
    assert gone.lora_A["default"].weight.requires_grad  # it is no part of the model any more
    assert len(adapted(stack)) == 8  # one is shared by two places
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert not adapted(stack)
    assert "other" in gone.specs


def test_a_parameter_that_somebody_else_replaces_is_switched():
    model = two_adapters()
    layer = model.get_base_model().layers[2].second
    layer.lora_A["other"].weight = nn.Parameter(torch.zeros(2, 4))
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(4, 2))
    model.set_adapter("other")
    assert training(model) == {"other"}
    model.set_adapter(["default", "other"])
    assert training(model) == {"default", "other"}
    model.set_requires_grad("other", False)
    assert training(model) == {"default"}


def test_both_ways_to_look_find_the_same_in_the_same_order():
    stack = two_adapters().get_base_model()
    named = list(adapter_modules(stack))
    assert [id(module) for _, module in named] == [id(module) for module in adapted(stack)]
    assert [name for name, _ in named] == [
        name for name, _ in stack.named_modules() if stack.get_submodule(name) in adapted(stack)
    ]


# ---- modules that are set up at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Factor(nn.Parameter(torch.zeros(2, 3))), Container])
def test_a_module_set_up_at_once_is_like_any_other(make):
    one, other, plain = make(), make(), nn.Module()
    for name, value in vars(plain).items():
        assert type(getattr(one, name)) is type(value), name
        if name != "_parameters":
            assert getattr(one, name) == value, name
        if isinstance(value, dict | set):
            assert getattr(one, name) is getattr(one, name), name
            assert getattr(one, name) is not getattr(other, name), name
    one.register_forward_hook(lambda *_: None)
    assert len(one._forward_hooks) == 1
    assert not other._forward_hooks


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_light_module_is_copied_whole(again):
    factor = Factor(nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2)))
    made = again(factor)
    assert [name for name, _ in made.named_parameters()] == ["weight", "bias"]
    assert torch.equal(made.weight, factor.weight)
    made.register_state_dict_post_hook(lambda *_: None)
    assert not factor._state_dict_hooks


def test_a_light_module_takes_what_torch_s_tools_put_into_modules():
    factor = Factor(nn.Parameter(torch.arange(6.0).view(2, 3)))
    torch.nn.utils.prune.l1_unstructured(factor, "weight", amount=1)
    assert [name for name, _ in factor.named_buffers()] == ["weight_mask"]
    torch.nn.utils.prune.remove(factor, "weight")
    torch.nn.utils.parametrizations.weight_norm(factor)
    assert torch.allclose(factor.weight, torch.arange(6.0).view(2, 3))
    assert {name for name, _ in factor.named_parameters()} == {
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }


def test_a_bias_of_a_factor_is_a_parameter_or_none():
    weight, bias = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2))
    assert Factor(weight).bias is None
    assert Factor(weight, bias).bias is bias
    assert dict(Factor(weight, bias).named_parameters()) == {"weight": weight, "bias": bias}


def test_attributes_are_set_as_they_are():
    module = Light.__new__(Light)
    begin(module)["rank"] = 3
    assert module.rank == 3
    assert module.training


def test_who_watches_parameters_sees_the_factors():
    seen = []
    handle = register_module_parameter_registration_hook(lambda module, name, value: seen.append(value.shape))
    try:
        lorica.get_peft_model(nn.Sequential(nn.Linear(5, 3)), lorica.LoraConfig(r=2, target_modules=["0"]))
    finally:
        handle.remove()
    assert torch.Size((2, 5)) in seen
    assert torch.Size((3, 2)) in seen


@pytest.mark.parametrize("shape", [(8, 16), (3, 5, 3, 3), (1, 1), (64, 1000)])
def test_the_reference_start_is_torch_s_to_the_last_bit(shape):
    from lorica.init.random import _kaiming

    ours, theirs = torch.empty(shape), torch.empty(shape)
    _kaiming(ours, torch.Generator().manual_seed(7))
    nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(7))
    assert torch.equal(ours, theirs)
