"""Every registered start and variant on a quantised base is what it is on the plain base of the same values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantised_layers as layers
from lorica import LoraConfig, PeftModel, get_peft_model
from lorica.init import INITS, subtracts
from lorica.storage import Packed, stored_weight
from lorica.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Merged into", "ignore:The adapter's start was taken"
)
#: Weight-only kinds, so that the plain twin computes the same product.
KINDS = ["bitsandbytes nf4", "torchao int8", "GPTQ, a stand-in"]
#: LoftQ starts from plain weights, which it quantises itself.
STARTS = [
    name.replace("_N", "_4") if isinstance(name, str) else name
    for name, init in INITS.items()
    if not init.needs and name != "loftq"
]


def quantised(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(layers.KINDS[kind](layers.dense(96, 128)), nn.Tanh(), layers.KINDS[kind](layers.dense(64, 96)))


def values(layer: Any) -> Tensor:
    stored = stored_weight(layer, "weight")
    assert isinstance(stored, Packed)
    return stored.dequantize()


def twin(model: nn.Sequential) -> nn.Sequential:
    """The same network of plain layers."""
    made = []
    for layer in (model[0], model[2]):
        weight = values(layer)
        plain = nn.Linear(weight.shape[1], weight.shape[0])
        plain.weight.data, plain.bias.data = weight.clone(), layer.bias.detach().clone()
        made.append(plain)
    return nn.Sequential(made[0], nn.Tanh(), made[1])


def adapted(model: nn.Module, fields: dict[str, Any]) -> PeftModel:
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"]} | copy.deepcopy(fields)
    return get_peft_model(model, LoraConfig(**config))


def disturb(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def compare(ours: PeftModel, plain: PeftModel, **options: Any) -> None:
    """Outputs, and gradients of factors and of the input."""
    found = []
    for model in (ours, plain):
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2), requires_grad=True)
        torch.manual_seed(4)
        y = model(x, **options)
        y.square().mean().backward()
        tensors = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        found.append({"output": y.detach(), "input": x.grad, **tensors})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[1].items():
        assert tensor is not None
        error = (found[0][name] - tensor).norm()
        assert error <= 1e-5 * tensor.norm() + 1e-9, (name, float(error / tensor.norm()))


def changes(fields: dict[str, Any]) -> bool:
    """Whether the base weight is changed for good."""
    init = fields.get("init_lora_weights", True)
    return subtracts(init, lookup=False) or any(VARIANTS[name].subtracts for name in fields if name in VARIANTS)


FEATURES = {f"init {name}": {"init_lora_weights": name} for name in STARTS}
FEATURES |= {
    "variant use_dora": {"use_dora": True},
    "variant use_dora, dropped inputs in evaluation": {"use_dora": True, "lora_dropout": 0.3},
    "variant kasa_config": {"kasa_config": {}},
    "variant use_bdlora": {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"]}},
    "variant use_qalora": {"use_qalora": True, "qalora_group_size": 16},
    "variant velora_config": {"velora_config": {"num_groups": 4, "scale": 0.9}},
    "variant monteclora_config": {"monteclora_config": {}},
}
ELSEWHERE = {"alora_invocation_tokens", "arrow_config"}  # they are of tokens and of other adapters, not of weights


def test_every_variant_is_here() -> None:
    assert {name for name in VARIANTS if name and f"variant {name}" not in FEATURES} == ELSEWHERE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_what_it_is_on_the_plain_base(feature: str, kind: str) -> None:
    fields = FEATURES[feature]
    base = quantised(kind)
    if changes(fields) and kind in layers.READ:
        pytest.skip("changes a weight that is only read: refused, as test_quantised.py has it")
    plain = None if changes(fields) else adapted(twin(base), fields)
    ours = adapted(base, fields)
    disturb(ours)
    if plain is None:  # the start left another weight here, which was quantised anew
        bare = nn.Sequential(*(getattr(layer, "base_layer", layer) for layer in base))
        calm = {key: value for key, value in fields.items() if key != "init_lora_weights"}
        plain = adapted(twin(bare), calm)
        for layer, other in zip(
            (base[0], base[2]), (plain.base_model.model[0], plain.base_model.model[2]), strict=True
        ):
            other.base_layer.weight.data.copy_(values(layer.base_layer))
    tensors = dict(ours.named_parameters())
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(tensors[name].data)
    compare(ours.eval(), plain.eval())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_that_name_their_adapters(kind: str) -> None:
    base = quantised(kind)
    models = [adapted(base, {}), adapted(twin(quantised(kind)), {})]
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        disturb(model.eval())
    names = ["other", "__base__", "default", "other"]
    x = torch.randn(4, 128)
    with torch.no_grad():
        ours, plain = (model(x, adapter_names=names) for model in models)
    assert (ours - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd"])
def test_adapters_are_combined(combination_type: str) -> None:
    models = [adapted(quantised("bitsandbytes nf4"), {}), adapted(twin(quantised("bitsandbytes nf4")), {})]
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
        disturb(model)
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "both", combination_type=combination_type)
        model.set_adapter("both")
    compare(*models)
