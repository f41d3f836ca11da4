"""The registry of measures; what a measure is, the package says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorica.bench.contest import (
    AGAINST_PEFT,
    FROZEN,
    LORICA,
    PEFT,
    Case,
    Contest,
    Figure,
    Measure,
    count_sides,
    quiet,
    ratio_of,
    seed_everything,
    take,
)

MEASURES: dict[str, Measure] = {}


def measure(name: str, title: str, **fields: Any) -> Callable[[Callable[[], list[Case]]], Callable[[], list[Case]]]:
    """Enter a function that lists cases as a measure; its docstring is the note under the title."""

    def add(cases: Callable[[], list[Case]]) -> Callable[[], list[Case]]:
        note = " ".join((cases.__doc__ or "").split())
        MEASURES[name] = Measure(name, title, note, tuple(cases()), **fields)
        return cases

    return add


__all__ = [
    "AGAINST_PEFT",
    "FROZEN",
    "LORICA",
    "MEASURES",
    "PEFT",
    "Case",
    "Contest",
    "Figure",
    "Measure",
    "count_sides",
    "measure",
    "quiet",
    "ratio_of",
    "seed_everything",
    "take",
]
