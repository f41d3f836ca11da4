"""A short training run, and all that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import runs
from lorica.train import job, metrics, recipe, state


def settings(given: tuple[Path, Path], output: Path) -> dict[str, Any]:
    made = runs.settings(*given, output, training__steps=6, training__eval_every=None, log__every=1)
    del made["data"]["eval_fraction"]
    return made | {"checkpoint": {"every": 2, "keep": 2}}


def run(values: dict[str, Any], notify: Callable[[str], None] = lambda said: None, **options: Any) -> job.Result:
    torch.manual_seed(123)  # a process of its own would start from other random states
    return job.run(recipe.parse(values), progress=False, notify=notify, **options)


def trace(output: Path) -> dict[str, Any]:
    """All that a run leaves, but for times."""
    found: dict[str, Any] = {"adapter": (output / "adapter" / state.ADAPTER).read_bytes()}
    for checkpoint in state.complete(output):
        found[f"{checkpoint.name} shards"] = (checkpoint / "state" / "shards-00000.safetensors").read_bytes()
        numbers = state.read_numbers(checkpoint)
        found[checkpoint.name] = [numbers[key] for key in ("step", "batches", "random", "data")]
    found["losses"] = [[record["step"], record["loss"]] for record in metrics.read(output / "metrics.jsonl")]
    left = {entry.name for folder in (output, output / "checkpoints") for entry in folder.iterdir()}
    found["partial"] = [name for name in left if name.startswith(".partial")]
    return found
