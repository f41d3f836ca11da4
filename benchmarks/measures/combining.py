"""Adapters made of adapters."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from benchmarks.models import adapt, chain, config
from benchmarks.suite import LORICA, PEFT, Case, Contest, measure, quiet
from lorica.bench.timing import Task

NAMES, WEIGHTS = ["default", "second"], [0.7, -1.3]


def build(quick: bool, *, width: int, kind: str) -> Contest:
    """Return the contest of ``add_weighted_adapter`` of two adapters of rank 16 on one linear."""
    base = chain(1, width // 4 if quick else width)

    def task(side: str) -> Task:
        model: Any = adapt(side, copy.deepcopy(base), init_lora_weights=False)
        with quiet():
            model.add_adapter("second", config(side, init_lora_weights=False))

        def reset() -> None:
            if "new" in model.peft_config:
                model.delete_adapter("new")

        def run() -> None:
            with quiet():
                model.add_weighted_adapter(NAMES, WEIGHTS, "new", kind, density=0.5)

        return Task(run, reset)

    return Contest({side: task(side) for side in (PEFT, LORICA)}, rounds=3 if quick else 5)


@measure("combining", "Combining two adapters")
def combining() -> list[Case]:
    """Two adapters of rank 16 on one linear, combined with the weights 0.7 and -1.3. peft's `svd` decomposes the sum of
    the deltas; lorica decomposes the core of the stacked factors, of 32 × 32 numbers, and gives the same matrix.
    `ties_svd` prunes the deltas, which are dense by that."""
    cases = [Case(f"svd, width {width}", partial(build, width=width, kind="svd")) for width in (512, 1024, 2048)]
    others = ("linear", "cat", "ties", "ties_svd")
    return cases + [Case(f"{kind}, width 1024", partial(build, width=1024, kind=kind)) for kind in others]
