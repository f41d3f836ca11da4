"""Merging an adapter into its base model and taking it out again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.models import adapted, llama
from benchmarks.suite import Case, Contest, measure
from lorica.bench.timing import Task

COUNTS = ("FLOPs", "kernels", "bytes moved", "peak bytes")


def build(quick: bool, *, layers: int, width: int, dtype: torch.dtype, safe_merge: bool = False) -> Contest:
    """Return the contest of ``merge_adapter`` and ``unmerge_adapter`` of every layer."""
    base = llama(layers, width // 4 if quick else width, dtype)

    def task(model: Any) -> Task:
        def run() -> None:
            model.merge_adapter(safe_merge=safe_merge)
            model.unmerge_adapter()

        return Task(run)

    tasks = {side: task(model) for side, model in adapted(base).items()}
    return Contest(tasks, rounds=6 if quick else 30, counts=COUNTS)


@measure("merging", "Merging and unmerging all layers")
def merging() -> list[Case]:
    """Rank 16 on every linear, factors in fp32. lorica adds `s·B·A` to a weight in fp32 in place, in one product; a
    bf16 one is widened, added to and rounded once, in chunks of rows that stay in the cache: more kernels, each of them
    small. peft forms the whole delta of a layer and adds it. The peak is what merging needs beside the model.
    `safe_merge` looks for NaN: lorica in all layers before a weight is touched, peft in one after the other."""
    shapes = {"4 layers of width 512": (4, 512), "1 layer of width 2048": (1, 2048)}
    return [
        Case(f"{label}, {shape}", partial(build, layers=layers, width=width, dtype=dtype))
        for shape, (layers, width) in shapes.items()
        for label, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items()
    ] + [
        Case(
            "safe_merge, fp32, 4 layers of width 512",
            partial(build, layers=4, width=512, dtype=torch.float32, safe_merge=True),
        )
    ]
