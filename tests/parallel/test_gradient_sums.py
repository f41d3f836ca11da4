"""Gradients are made whole once per step, whoever steps; the global norm counts every element once."""

from __future__ import annotations

from typing import Any

import divisions
import pytest
import ranks
import torch
from contract import adapt
from subjects import SUBJECTS, batch, logits_of, loss_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lorica
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import collect, pieces
from lorica.parallel import GradScaler, clip_grad_norm_, get_total_norm, parameter_groups, sum_gradients

SUBJECT = SUBJECTS["llama"]
MIXED = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
CUTS = {
    "native": (2, divisions.native(tp=2)),
    "native copies": (8, divisions.native(tp=8)),
    "transformers": (2, divisions.transformers(tp_size=2)),
    "native fsdp": (4, divisions.native(fsdp=2, tp=2)),
    "torch fsdp": (2, divisions.fully_sharded),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("llama"))
    SUBJECT.build().save_pretrained(path)
    return path


def made(cut: str, folder: str, **fields: Any) -> nn.Module:
    options = {"init_lora_weights": False, "r": 4, **SUBJECT.fields, **fields}
    return adapt(CUTS[cut][1](SUBJECT, folder), lorica.LoraConfig(**options)).train()


def whole(**fields: Any) -> nn.Module:
    options = {"init_lora_weights": False, "r": 4, **SUBJECT.fields, **fields}
    return adapt(SUBJECT.build(), lorica.LoraConfig(**options)).train()


def backward(model: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    ids = batch(2, seed)
    (loss_of(logits_of(model(input_ids=ids)), ids) * scale).backward()


def logical(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors on rank 0, as in its file."""
    return collect(pieces(adapter_entries(model, "default", model.peft_config["default"])))


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def _steps(cut: str, folder: str, fields: dict[str, Any], how: str) -> None:
    mine, oracle = made(cut, folder, **fields), whole(**fields)
    options: dict[str, Any] = {"foreach": {"foreach": True}, "fused": {"fused": True}}.get(how, {})
    # With so large an eps a gradient that is rounding does not become a step of its own.
    optimizers = [torch.optim.AdamW(parameter_groups(model), 0.1, eps=0.1, **options) for model in (mine, oracle)]
    for step in range(3):
        for model, optimizer in zip((mine, oracle), optimizers, strict=True):
            backward(model, 2 * step)
            backward(model, 2 * step + 1)  # accumulated
            if how == "clipped" and model is mine:
                clip_grad_norm_(mine, 0.05)
            elif how == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            elif how == "explicit" and model is mine:
                sum_gradients(model)
                sum_gradients(model)  # once more changes nothing
            optimizer.step()
            optimizer.zero_grad()
    saved = {
        name: entry.tensor.detach()
        for name, entry in adapter_entries(oracle, "default", oracle.peft_config["default"]).items()
    }
    same(logical(mine), saved)


@pytest.mark.parametrize("how", ["unasked", "explicit", "clipped", "foreach", "fused"])
@pytest.mark.parametrize("cut", ["native", "transformers"])
def test_steps_equal_one_process(cut: str, how: str, folder: str) -> None:
    ranks.run(2, _steps, cut, folder, {}, how)


@pytest.mark.parametrize(
    ("cut", "how"), [("native copies", "clipped"), ("native fsdp", "unasked"), ("torch fsdp", "clipped")]
)
def test_steps_on_other_layouts_equal_one_process(cut: str, how: str, folder: str) -> None:
    ranks.run(CUTS[cut][0], _steps, cut, folder, {}, how)


@pytest.mark.parametrize("how", ["clipped", "foreach", "fused"])
@pytest.mark.parametrize("cut", ["native", "transformers"])
def test_a_module_that_trains_whole_beside_the_factors(cut: str, how: str, folder: str) -> None:
    ranks.run(2, _steps, cut, folder, MIXED, how)


def _mixture(folder: str) -> bool:
    model = made("transformers", folder, **MIXED)
    kinds = {isinstance(parameter, DTensor) for parameter in model.parameters() if parameter.requires_grad}
    assert kinds == {True, False}
    return len(parameter_groups(model)) == 2


def test_plain_and_distributed_parameters_are_in_groups_of_their_own(folder: str) -> None:
    assert ranks.run(2, _mixture, folder) == [True, True]


def _norms(cut: str, folder: str, order: float) -> None:
    mine, oracle = made(cut, folder), whole()
    for model in (mine, oracle):
        backward(model)
    sum_gradients(mine)
    wanted = nn.utils.get_total_norm([p.grad for p in oracle.parameters() if p.grad is not None], order)
    torch.testing.assert_close(get_total_norm(mine, order), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("cut", ["native copies", "native fsdp", "transformers", "torch fsdp"])
def test_the_norm_counts_every_element_once(cut: str, order: float, folder: str) -> None:
    ranks.run(CUTS[cut][0], _norms, cut, folder, order)


def _overflow(folder: str) -> tuple[bool, float]:
    """One shard's gradient overflows on one rank only."""
    model = made("native", folder)
    scaler = GradScaler(model, "cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(parameter_groups(model), 0.5)
    before = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    backward(model, scale=float(scaler.scale(torch.ones(()))))
    if torch.distributed.get_rank() == 1:
        shard = next(p for n, p in model.named_parameters() if "q_proj.lora_B" in n)
        assert shard.grad is not None
        shard.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), scaler.get_scale()


def test_an_overflow_on_one_rank_stops_all(folder: str) -> None:
    assert ranks.run(2, _overflow, folder) == [(True, 4.0)] * 2


def _scaled(folder: str) -> None:
    mine, oracle = made("native", folder), whole()
    scaler = GradScaler(mine, "cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(parameter_groups(mine), 0.5)
    backward(mine, scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    backward(oracle)
    torch.optim.SGD(parameter_groups(oracle), 0.5).step()
    saved = {
        name: entry.tensor.detach()
        for name, entry in adapter_entries(oracle, "default", oracle.peft_config["default"]).items()
    }
    same(logical(mine), saved)


def test_a_scaled_step_equals_an_unscaled_one(folder: str) -> None:
    ranks.run(2, _scaled, folder)
