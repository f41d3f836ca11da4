"""What an adapter costs that comes, goes, or is switched, in function calls (Python's and C's), which do not jitter.

What is asked for is the cost of one more module: the difference between two models of unequal depth.
"""

from __future__ import annotations

import copy
import cProfile
import importlib
import pstats
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from benchmarks.measures.lifecycle import NAMES
from benchmarks.models import adapt, config, llama
from benchmarks.suite import LORICA, PEFT, quiet

#: Layers of the two models; a layer has seven linears.
DEPTHS = (4, 12)
LINEARS = 7 * (DEPTHS[1] - DEPTHS[0])


def calls(run: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    with quiet():
        profile.enable()
        run()
        profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def base(layers: int) -> Any:
    return llama(layers, 16, inner=16)


def inject(side: str, layers: int, targets: Any) -> int:
    model = base(layers)
    return calls(lambda: adapt(side, model, r=8, target_modules=targets))


def inject_empty(side: str, layers: int) -> int:
    model = base(layers)
    library: Any = importlib.import_module(side)
    return calls(lambda: library.get_peft_model(model, config(side, r=8), low_cpu_mem_usage=True))


def with_two(side: str, layers: int) -> Any:
    model = adapt(side, base(layers), r=8)
    with quiet():
        model.add_adapter("other", config(side, r=8))
    return model


def add(side: str, layers: int) -> int:
    model = adapt(side, base(layers), r=8)
    return calls(lambda: model.add_adapter("other", config(side, r=8)))


def switch(side: str, layers: int) -> int:
    model = with_two(side, layers)
    return calls(lambda: model.set_adapter("other"))


def delete(side: str, layers: int) -> int:
    model = with_two(side, layers)
    return calls(lambda: model.delete_adapter("other"))


def off_and_on(side: str, layers: int) -> int:
    model = with_two(side, layers)

    def run() -> None:
        with model.disable_adapter():
            pass

    return calls(run)


#: Calls for each further linear, at most: a tenth more than was counted. peft makes 9 to 18 times as many.
OPERATIONS = {
    "7 names": (partial(inject, targets=NAMES), 420),
    "all-linear": (partial(inject, targets="all-linear"), 475),
    "without values": (inject_empty, 435),
    "add": (add, 375),
    "set_adapter": (switch, 36),
    "delete_adapter": (delete, 31),
}


@cache
def per_linear(name: str, side: str) -> float:
    operation, _ = OPERATIONS[name]
    operation(side, 1)  # what is made once in a process, is made
    few, many = (operation(side, layers) for layers in DEPTHS)
    return (many - few) / LINEARS


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_module_costs_few_calls(name):
    assert per_linear(name, LORICA) <= OPERATIONS[name][1]


@pytest.mark.parametrize(("name", "times"), [("7 names", 8), ("add", 8), ("set_adapter", 10), ("delete_adapter", 10)])
def test_each_module_costs_a_part_of_what_it_costs_peft(name, times):
    assert per_linear(name, LORICA) * times <= per_linear(name, PEFT)


def test_turning_adapters_off_visits_no_module():
    few, many = (off_and_on(LORICA, layers) for layers in DEPTHS)
    assert few == many


def test_another_adapter_costs_what_the_first_did():
    model = with_two(LORICA, DEPTHS[1])
    for number in range(6):
        model.add_adapter(f"more{number}", config(LORICA, r=8))
    assert calls(lambda: model.add_adapter("last", config(LORICA, r=8))) <= 1.1 * add(LORICA, DEPTHS[1])


def test_a_copy_costs_what_its_model_does():
    model = with_two(LORICA, DEPTHS[0])
    copied = copy.deepcopy(model)
    assert calls(lambda: copied.set_adapter("other")) == calls(lambda: model.set_adapter("other"))
