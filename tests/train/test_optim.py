"""Learning rates over the steps and over the parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lorica
import runs
from lorica.train import optim
from lorica.train.recipe import TrainingSection


def rates(steps: int, **settings: Any) -> list[float]:
    chosen = TrainingSection(learning_rate=2.0, **settings)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.AdamW([parameter], lr=2.0)
    schedule = optim.schedule(optimiser, chosen, steps)
    found = []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "warmup_steps": 0}, [2.0] * 6),
        ({"schedule": "constant", "warmup_steps": 4}, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
        ({"schedule": "linear", "warmup_steps": 2}, [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ({"schedule": "linear", "warmup_ratio": 1 / 3, "min_lr_ratio": 0.5}, [1.0, 2.0, 2.0, 1.75, 1.5, 1.25]),
        (
            {"schedule": "cosine", "warmup_ratio": 0.0},
            [1 + math.cos(math.pi * step / 6) for step in range(6)],
        ),
        ({"schedule": "cosine", "warmup_steps": 9}, [2 * (step + 1) / 9 for step in range(6)]),
    ],
)
def test_the_course_of_the_learning_rate(settings: dict[str, Any], expected: list[float]) -> None:
    assert rates(6, **settings) == pytest.approx(expected)


def adapted(**config: Any) -> Any:
    return lorica.get_peft_model(runs.llama(), lorica.LoraConfig(task_type="CAUSAL_LM", r=2, **config))


def test_lora_plus_speeds_up_b_and_embedding_factors_and_spares_vectors_decay() -> None:
    model = adapted(target_modules=["q_proj", "embed_tokens"], lora_bias=False, modules_to_save=["model.norm"])
    settings = TrainingSection(learning_rate=0.1, loraplus_lr_ratio=16, weight_decay=0.5)
    found = {
        name: (group["lr"], group["weight_decay"]) for group in optim.groups(model, settings) for name in group["names"]
    }
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trainable
    for name, (rate, decay) in found.items():
        fast = "lora_B" in name or "lora_embedding" in name
        assert rate == pytest.approx(1.6 if fast else 0.1)
        assert decay == (0.0 if "norm" in name else 0.5)
    assert sum("norm" in name for name in found) == 1


def test_one_group_without_lora_plus() -> None:
    (group,) = optim.optimizer(adapted(target_modules="all-linear"), TrainingSection()).param_groups
    assert group["fused"]
    assert group["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", ["lora_fa", "riemannian"])
def test_the_recipe_names_the_optimiser(name: str) -> None:
    model = adapted(target_modules=["q_proj"])
    settings = TrainingSection(optimizer=name, learning_rate=0.1, weight_decay=0.1)
    optimiser = optim.optimizer(model, settings)
    course = optim.schedule(optimiser, settings, 10)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in key for key in before) == (name == "riemannian")
    ids = torch.arange(6).view(1, 6)
    for _ in range(2):  # the first step of B, from zero, gives A a gradient
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        course.step()
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)
