"""PEFT's ``target_parameters``: the same names, files, outputs, gradients and merged weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import peft, quiet, relative

import lorica
import mixtures
import models
from lorica.checkpoint.names import adapter_entries

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": mixtures.STACKS}


def twins(base: nn.Module, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours, with the same random factors."""
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**FIELDS | fields))
    ours = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(**FIELDS | fields))
    share_factors(theirs, ours, "default")
    return theirs, ours


def share_factors(theirs: nn.Module, ours: nn.Module, name: str) -> None:
    """Give an adapter the same random factors in both, through the public state-dict functions."""
    generator = torch.Generator().manual_seed(3)
    with quiet():
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        state = {key: 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}
        peft.set_peft_model_state_dict(theirs, state, adapter_name=name)
    lorica.set_peft_model_state_dict(ours, state, adapter_name=name, strict=True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of our factors under the names and in the shapes of a file."""
    entries = adapter_entries(model, "default", model.peft_config["default"])
    return {name: entry.saved(entry.tensor.grad) for name, entry in entries.items()}


def same_runs(theirs: nn.Module, ours: nn.Module) -> None:
    """Equal outputs and gradients."""
    batch = models.ids(2, 7)
    with quiet():
        wanted = theirs(batch)
        mixtures.loss_of(wanted).backward()
    output = ours(batch)
    mixtures.loss_of(output).backward()
    assert relative(output.logits, wanted.logits) < 1e-5
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    actual = gradients(ours)
    assert sorted(actual) == sorted(expected)
    for name, gradient in expected.items():
        assert relative(actual[name], gradient) < 1e-5, name


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "grouped_mm") for kind in mixtures.KINDS), ("qwen3_moe", "eager"), ("gpt_oss", "batched_mm")],
)
def test_outputs_gradients_and_merged_weights(kind, implementation):
    theirs, ours = twins(mixtures.moe(kind, implementation=implementation))
    same_runs(theirs, ours)
    with quiet():
        expected = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in ours.merge_and_unload().named_parameters():
        assert relative(parameter, expected[name]) < 1e-6, name


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj"]},
        {"target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"], "target_modules": ["q_proj", "o_proj"]},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3}, "use_rslora": True},
    ],
    ids=["one", "router", "modules too", "patterns"],
)
def test_choices(fields):
    theirs, ours = twins(mixtures.moe(), **fields)
    same_runs(theirs, ours)


def test_a_linears_weight_is_the_linear():
    theirs, ours = twins(mixtures.moe(), target_parameters=["q_proj.weight"])
    same_runs(theirs, ours)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_files_go_both_ways(kind, tmp_path: Path):
    base = mixtures.moe(kind)
    theirs, ours = twins(base)
    batch = models.ids(2, 7)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(loaded(batch).logits, ours(batch).logits)
    with quiet():
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        assert torch.equal(back(batch).logits, theirs(batch).logits)


def test_a_second_adapter():
    theirs, ours = twins(mixtures.moe())
    with quiet():
        theirs.add_adapter("other", peft.LoraConfig(**FIELDS | {"r": 2}))
    ours.add_adapter("other", lorica.LoraConfig(**FIELDS | {"r": 2}))
    share_factors(theirs, ours, "other")
    batch = models.ids(2, 7)
    for active in ("other", "default", ["default", "other"]):
        with quiet():
            theirs.base_model.set_adapter(active)
            expected = theirs(batch).logits
        ours.base_model.set_adapter(active)
        assert relative(ours(batch).logits, expected) < 1e-5


class AllAtOnce(nn.Module):
    """Experts that are multiplied all at once by ``[E, in, out]`` and do not say that they are transposed (Llama 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.gate_up_proj)


def test_experts_that_are_multiplied_all_at_once():
    """PEFT takes the middle dimension of such a stack for its outputs; so do we."""
    base = nn.Sequential(nn.Identity(), AllAtOnce())
    theirs, ours = twins(base, target_parameters=["1.gate_up_proj"])
    x = torch.randn(3, 5, 8)
    with quiet():
        expected = theirs(x)
    assert relative(ours(x), expected) < 1e-5
