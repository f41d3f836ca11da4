"""Quantised base layers against PEFT on the same quantised modules: outputs, gradients, magnitudes, merged weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import peft

import lorica
import quantised_layers as layers
from lorica.storage import Packed, stored_weight

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
#: PEFT finds bitsandbytes' layers by what transformers wrote on the model.
FLAGS = {"bitsandbytes int8": "is_loaded_in_8bit"}
KINDS = [
    "bitsandbytes int8",
    "bitsandbytes nf4",
    "bitsandbytes nf4, scales plain",
    "bitsandbytes fp4",
    "torchao int8",
    "torchao float8",
    "torchao int4 in groups",
    "HQQ",
]
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}


class Subclass:
    """What transformers' quantisation config gives PEFT for merging into torchao's tensors."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def get_apply_tensor_subclass(self) -> Any:
        quantization = pytest.importorskip("torchao.quantization")
        return {
            "torchao int8": quantization.Int8WeightOnlyConfig,
            "torchao float8": quantization.Float8WeightOnlyConfig,
            "torchao int4 in groups": lambda: quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
            ),
        }[self.kind]()


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        layers.KINDS[kind](layers.dense(96, 128)), nn.Tanh(), layers.KINDS[kind](layers.dense(64, 96))
    )
    setattr(model, FLAGS.get(kind, "is_loaded_in_4bit"), True)
    if kind in ("torchao int8", "torchao float8", "torchao int4 in groups"):
        holder = type("Quantizer", (), {"quantization_config": Subclass(kind)})()
        model.hf_quantizer = holder
    return model


def pair(kind: str, fields: dict[str, Any]) -> twins.Twins:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": False} | fields
    with twins.quiet():
        theirs = peft.get_peft_model(network(kind), peft.LoraConfig(**copy.deepcopy(config)))
    ours = lorica.get_peft_model(network(kind), lorica.LoraConfig(**config))
    twins.share_factors((theirs, ours))
    return theirs, ours


def values(layer: Any) -> Tensor:
    stored = stored_weight(layer.get_base_layer(), "weight")
    assert isinstance(stored, Packed)
    return stored.dequantize().double()


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_same(kind: str, fields: dict[str, Any]) -> None:
    theirs, ours = pair(kind, fields)
    torch.manual_seed(1)
    x = torch.randn(2, 5, 128, requires_grad=True)
    outputs, inputs = [], []
    for model in (theirs, ours):
        model.train()
        x.grad = None
        with twins.quiet():
            y = model(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        outputs.append(y)
        inputs.append(x.grad)
    twins.assert_close(outputs[1], outputs[0], 1e-6, "output")
    twins.assert_close(inputs[1], inputs[0], 1e-6, "gradient of the input")
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        twins.assert_close(found[name], gradient, 2e-6, name)


@pytest.mark.parametrize("kind", KINDS)
def test_magnitudes_start_the_same(kind: str) -> None:
    theirs, ours = pair(kind, {"use_dora": True, "init_lora_weights": True})
    with twins.quiet():
        theirs = peft.get_peft_model(
            network(kind), peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True, init_lora_weights=True)
        )
    ours = lorica.get_peft_model(
        network(kind), lorica.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True, init_lora_weights=True)
    )
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            twins.assert_close(ours.get_parameter(name), parameter, 1e-6, name)


@pytest.mark.filterwarnings("ignore:Merged into")
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_weight_is_at_least_as_near_the_wanted_one(kind: str, fields: dict[str, Any]) -> None:
    if kind.startswith("torchao") and fields.get("use_dora"):
        pytest.skip("PEFT adds the delta and forgets the magnitude there: see the test below")
    theirs, ours = pair(kind, fields)
    wanted = []
    for name in ("0", "2"):
        layer = ours.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").double()
        weight = values(layer) + delta
        if fields.get("use_dora"):
            magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        wanted.append(weight)
    with twins.quiet():
        theirs.merge_adapter()
    ours.merge_adapter()
    for name, weight in zip(("0", "2"), wanted, strict=True):
        errors = [
            twins.relative(values(model.base_model.model.get_submodule(name)), weight) for model in (ours, theirs)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-6), (name, errors)


@pytest.mark.filterwarnings("ignore:Merged into")
@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_gives_back_what_theirs_only_comes_near(kind: str) -> None:
    theirs, ours = pair(kind, {})
    before = [values(model.base_model.model.get_submodule("0")) for model in (theirs, ours)]
    with twins.quiet():
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    ours.merge_adapter()
    ours.unmerge_adapter()
    after = [values(model.base_model.model.get_submodule("0")) for model in (theirs, ours)]
    assert torch.equal(after[1], before[1])
    assert not math.isclose(twins.relative(after[0], before[0]), 0)


def test_their_torchao_merge_of_dora_forgets_the_magnitude() -> None:
    """Where PEFT is wrong: what it merges is not what its own forward computes."""
    theirs, ours = pair("torchao int8", {"use_dora": True})
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(2)
    x = torch.randn(3, 128)
    theirs.eval()
    with torch.no_grad(), twins.quiet():
        y = theirs(x)
        theirs.merge_adapter()
        assert twins.relative(theirs(x), y) > 0.3
    with torch.no_grad():
        twins.assert_close(ours.eval()(x), y, 1e-6)
        with pytest.warns(UserWarning, match="torchao"):
            ours.merge_adapter()
        twins.assert_close(ours(x), y, 0.02)


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8"])
def test_adapters_go_both_ways(kind: str, tmp_path: Path) -> None:
    theirs, ours = pair(kind, {})
    x = torch.randn(3, 128)
    ours.save_pretrained(str(tmp_path / "ours"))
    with twins.quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"))
        there = peft.PeftModel.from_pretrained(network(kind), str(tmp_path / "ours")).eval()
        here = lorica.PeftModel.from_pretrained(network(kind), str(tmp_path / "theirs")).eval()
        with torch.no_grad():
            twins.assert_close(here(x), there(x), 1e-6)
            twins.assert_close(here(x), theirs.eval()(x), 1e-6)
