"""Intruder dimensions: found where they were planted, and made smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_weighted import adapted
from torch import Tensor, nn

import lorica
from cases import OPS
from lorica.adapt.inject import lora_layers
from lorica.combine import intruder_dimensions, reduce_intruder_dimension
from lorica.errors import AdapterError
from mixtures import STACKS, moe
from models import MLP, floats, transformers_conv1d

BY_NAME = {op.name: op for op in OPS}


def planted(base: nn.Module, strength: float, **fields: Any) -> Any:
    """A weight with known directions, and an adapter along one that is a mixture of all of them."""
    (linear,) = (module for module in base.modules() if hasattr(module, "weight"))
    with torch.no_grad():
        weight = linear.weight if not fields.get("fan_in_fan_out") else linear.weight.T
        weight.copy_(torch.diag(torch.linspace(4, 1, weight.shape[0]))[:, : weight.shape[1]])
    model = lorica.get_peft_model(base, lorica.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], **fields))
    (layer,) = lora_layers(model)
    factors = layer.factors("default")
    with torch.no_grad():
        factors.a.zero_()
        factors.b.zero_()
        factors.a[0] = torch.ones(16) / 4
        factors.b[:, 0] = torch.ones(16) / 4 * strength
        factors.a[1, 3], factors.b[3, 1] = 0.2, 0.2
    return model


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_planted_direction_is_found_and_made_smaller(kind: str):
    torch.manual_seed(0)
    if kind == "linear":
        model = planted(nn.Sequential(nn.Linear(16, 16, bias=False)), 8.0)
    else:
        model = planted(nn.Sequential(transformers_conv1d(16, 16)), 8.0, fan_in_fan_out=True)
    (report,) = intruder_dimensions(model, threshold_epsilon=0.6)
    assert report.name == "base_model.model.0"
    assert report.intruders == (0,)
    assert float(report.similarity[0]) == pytest.approx(0.25, abs=0.06)
    assert float(report.values[0]) > 16
    said: list[str] = []
    reduce_intruder_dimension(model, threshold_epsilon=0.6, mitigation_lambda=0.0, logging_sink=said.append)
    assert said == ["base_model.model.0: Intruders: 1", "Enabling new adapter intruder_reduced"]
    assert model.active_adapters == ["intruder_reduced"]
    (less,) = intruder_dimensions(model, "intruder_reduced", threshold_epsilon=0.6)
    assert float(less.values[0]) < 6


def test_a_direction_is_the_same_with_the_other_sign():
    # The sign of a singular vector is that of its largest entry, and the adapter makes another one the largest.
    base = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        base[0].weight.copy_(5 * torch.outer(torch.tensor([1.0, -0.99, 0.0]), torch.tensor([1.0, 0.0, 0.0])))
        base[0].weight += 0.1 * torch.eye(3)
    model = lorica.get_peft_model(base, lorica.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    factors = lora_layers(model)[0].factors("default")
    with torch.no_grad():
        factors.a.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        factors.b.copy_(torch.tensor([[0.0], [-0.2], [0.0]]))
    (report,) = intruder_dimensions(model, top_k=1)
    assert report.intruders == ()
    assert float(report.similarity[0]) > 0.99


def oracle(weight: Tensor, delta: Tensor, scale: float, rank: int, top: int, limit: float, left_over: float) -> Tensor:
    """The published procedure on dense matrices, in float64."""
    base, merged = torch.linalg.svd(weight), torch.linalg.svd(weight + delta)
    similarity = (merged.U.T @ base.U).abs().amax(1)[:top]
    chosen = torch.where(similarity < limit)[0]
    spoiled = (merged.U[:, chosen] * merged.S[chosen]) @ merged.Vh[chosen]
    u, s, v = torch.linalg.svd(delta + (left_over - 1) * spoiled, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("op", ["linear", "transformers-conv1d", "embedding", "conv2d"])
@pytest.mark.parametrize("left_over", [0.75, 0.3])
def test_the_new_delta_is_that_of_the_dense_procedure(op: str, left_over: float):
    case = BY_NAME[op]
    model = adapted(case.build(), case.config(lorica, use_rslora=True))
    (layer,) = lora_layers(model)
    turned = layer.op.lookup or layer.op.transposed

    def flat(tensor: Tensor) -> Tensor:
        return (tensor.T if turned else tensor.flatten(1)).detach().double()

    factors, scale = layer.factors("default"), layer.scaling["default"]
    delta = scale * factors.b.flatten(1).detach().double() @ factors.a.flatten(1).detach().double()
    wanted = oracle(flat(layer.base_layer.weight), delta, scale, 4, 5, 0.8, left_over)
    with torch.no_grad():
        reduce_intruder_dimension(model, top_k=5, threshold_epsilon=0.8, mitigation_lambda=left_over, logging_sink=None)
    new = layer.factors("intruder_reduced")
    found = scale * new.b.flatten(1).detach().double() @ new.a.flatten(1).detach().double()
    assert float((found - wanted).norm() / wanted.norm()) < 2e-5
    assert float((found - delta).norm() / delta.norm()) > 0.05


def test_without_intruders_the_factors_are_copied():
    model = adapted(MLP(), lorica.LoraConfig(r=2, target_modules=["lin0", "lin1"], lora_bias=True))
    said: list[str] = []
    reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=said.append)
    assert said[:2] == [f"base_model.model.lin{n}: No intruders" for n in (0, 1)]
    for layer in lora_layers(model):
        for old, new in zip(
            layer.factors("default").tensors(), layer.factors("intruder_reduced").tensors(), strict=True
        ):
            assert torch.equal(old, new)


def test_experts_are_looked_at_one_by_one():
    model = adapted(moe(), lorica.LoraConfig(r=2, target_modules=[], target_parameters=STACKS))
    reports = intruder_dimensions(model, top_k=3, threshold_epsilon=0.9)
    assert len(reports) == 2 * 2 * 4
    assert reports[1].name.endswith("[1]")
    before = {report.name: report for report in reports}
    reduce_intruder_dimension(model, top_k=3, threshold_epsilon=0.9, mitigation_lambda=0.1, logging_sink=None)
    after = intruder_dimensions(model, "intruder_reduced", top_k=3, threshold_epsilon=0.9)
    assert sum(float(report.values[0]) for report in after) < sum(float(r.values[0]) for r in before.values())


def test_refusals_change_nothing():
    model = adapted(MLP(), lorica.LoraConfig(r=2, target_modules=["lin0"], use_dora=True))
    with pytest.raises(AdapterError, match="use_dora changes the whole weight"):
        reduce_intruder_dimension(model)
    model = adapted(MLP(), lorica.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="took its start out of the base weights"):
        intruder_dimensions(model)
    model = adapted(MLP(), lorica.LoraConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(AdapterError, match="already exists"):
        reduce_intruder_dimension(model, new_adapter_name="default")
    with pytest.raises(AdapterError, match="gone"):
        intruder_dimensions(model, "gone")
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"\['default'\] are merged into it"):
        intruder_dimensions(model)
    model.unmerge_adapter()
    assert list(model.peft_config) == ["default"]
    assert torch.isfinite(model(floats(2, 10))).all()
