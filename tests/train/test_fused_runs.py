"""Runs whose MLPs are computed as one each: the same run, in less memory, or an error that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import runs
from lorica.errors import RecipeError
from lorica.layers import gated
from lorica.train import job, metrics, recipe


def run(values: dict[str, Any]) -> job.Result:
    return job.run(recipe.parse(values), progress=False, notify=lambda _: None)


@pytest.mark.parametrize(
    "training", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": "reentrant"}, {"bf16": True}], ids=str
)
def test_a_fused_run_is_the_run_that_is_not(
    training: dict[str, Any], base: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    find = gated.kernel_for
    monkeypatch.setattr(gated, "kernel_for", lambda op, *args: taken.append(op) or find(op, *args))
    losses = []
    for fuse in (False, True):
        values = runs.settings(base, data_file, tmp_path / str(fuse), model__fuse_mlp=fuse, training__steps=5)
        values["training"] |= training
        values["lora"]["lora_dropout"] = 0.1
        taken.clear()
        run(values)
        assert bool(taken) == fuse
        losses.append([entry["loss"] for entry in metrics.read(tmp_path / str(fuse) / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3 if "bf16" in training else 1e-5)


def test_a_run_with_nothing_to_fuse_is_refused(base: Path, data_file: Path, tmp_path: Path) -> None:
    values = runs.settings(base, data_file, tmp_path / "out", model__fuse_mlp=True)
    values["lora"]["use_dora"] = True
    values["lora"]["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    with pytest.raises(RecipeError, match=r"model\.fuse_mlp: .* is not one adapter of plain LoRA"):
        run(values)
    values["lora"] |= {"use_dora": False, "target_modules": ["q_proj"]}
    with pytest.raises(RecipeError, match=r"model\.fuse_mlp: no MLP is fused"):
        run(values)
    assert not (tmp_path / "out").exists()
