"""Putting adapters in, switching them, taking them out: pure Python over many modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from benchmarks.models import adapt, config, llama
from benchmarks.suite import LORICA, PEFT, Case, Contest, measure
from lorica.bench.timing import Task

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNTS = ("kernels", "bytes moved")


def many_linears(quick: bool) -> nn.Module:
    """Return a Llama of 448 linears of width 16 (quick: 56)."""
    return llama(8 if quick else 64, 16, inner=16)


def build_inject(quick: bool, *, targets: Any) -> Contest:
    """Return the contest of ``get_peft_model`` on a fresh base model."""
    base = many_linears(quick)

    def task(side: str) -> Task:
        fresh: list[nn.Module] = []

        def reset() -> None:
            fresh[:] = [copy.deepcopy(base)]

        return Task(lambda: adapt(side, fresh[0], r=8, target_modules=targets), reset)

    return Contest({side: task(side) for side in (PEFT, LORICA)}, rounds=6 if quick else 30, counts=COUNTS)


Operation = Callable[[Any, str], Task]


def build_operation(quick: bool, *, operation: Operation, adapters: int, counts: tuple[str, ...] = ()) -> Contest:
    """Return the contest of an operation on models that hold ``adapters`` adapters."""
    base = many_linears(quick)
    tasks = {}
    for side in (PEFT, LORICA):
        model: Any = adapt(side, copy.deepcopy(base), r=8)
        for number in range(1, adapters):
            model.add_adapter(f"adapter{number}", config(side, r=8))
        tasks[side] = operation(model, side)
    return Contest(tasks, rounds=6 if quick else 30, counts=counts)


def switch(model: Any, side: str) -> Task:
    """To the second adapter and back."""

    def run() -> None:
        model.set_adapter("adapter1")
        model.set_adapter("default")

    return Task(run)


def disable(model: Any, side: str) -> Task:
    """Off and on again."""

    def run() -> None:
        with model.disable_adapter():
            pass

    return Task(run)


def add(model: Any, side: str) -> Task:
    """Add an adapter to a model that has one."""
    return Task(partial(model.add_adapter, "extra", config(side, r=8)), partial(_without, model, "extra"))


def delete(model: Any, side: str) -> Task:
    """Delete an adapter that is not active."""

    def reset() -> None:
        _without(model, "extra")
        model.add_adapter("extra", config(side, r=8))

    return Task(partial(model.delete_adapter, "extra"), reset)


def unload(model: Any, side: str) -> Task:
    """Give the base model back."""
    holder: list[Any] = []

    def reset() -> None:
        holder[:] = [copy.deepcopy(model)]

    return Task(lambda: holder[0].unload(), reset)


def _without(model: Any, name: str) -> None:
    if name in model.peft_config:
        model.delete_adapter(name)


@measure("injection", "Putting adapters into 448 linears, switching them, taking them out")
def injection() -> list[Case]:
    """A Llama of 64 layers of width 16, rank 8, so that the tensors cost nothing and only the work per module counts.
    `set_adapter`: to the second of two adapters and back. `disable_adapter`: into the context and out of it."""
    operations: list[tuple[str, Operation, int]] = [
        ("set_adapter, there and back", switch, 2),
        ("disable_adapter, off and on", disable, 2),
        ("delete_adapter", delete, 1),
        ("unload", unload, 1),
    ]
    return [
        Case("get_peft_model, 7 names", partial(build_inject, targets=NAMES)),
        Case("get_peft_model, all-linear", partial(build_inject, targets="all-linear")),
        Case("add a second adapter", partial(build_operation, operation=add, adapters=1, counts=COUNTS)),
        *(
            Case(name, partial(build_operation, operation=operation, adapters=adapters))
            for name, operation, adapters in operations
        ),
    ]
