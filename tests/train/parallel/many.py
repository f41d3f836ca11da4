"""A run on many ranks, as each of them sees it, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ranks

from lorica.train import job, metrics, recipe

SPEEDS = ("seconds", "tokens_per_second")


def train(values: dict[str, Any], options: dict[str, Any]) -> int:
    return job.run(recipe.parse(values), progress=False, notify=lambda _: None, **options).steps


def run(count: int, values: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Train on ``count`` ranks (on this process, if that is one) and return the records."""
    if count == 1:
        train(values, options)
    else:
        ranks.run(count, train, values, options, timeout=600)
    return records(Path(values["output_dir"]))


def records(output: Path) -> list[dict[str, Any]]:
    found = metrics.read(output / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in SPEEDS} for record in found]


def assert_same_curve(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float = 2e-5) -> None:
    """The same records; real numbers within ``tolerance`` of each other, the rest equal."""
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    for first, second in zip(ours, theirs, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if isinstance(value, float):
                assert abs(value - second[key]) <= tolerance * max(1.0, abs(value)), (key, first, second)
            else:
                assert value == second[key], (key, first, second)
