"""Interleaved timing: A B, B A, A B … in one process, so that what slows the machine slows every side alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations

import torch

Clock = Callable[[], float]

#: A task without a reset is called in a loop until one sample lasts this long, in seconds.
SHORTEST_SAMPLE = 2e-3

#: Six rounds hold every order of three sides once.
FEWEST_ROUNDS = 6


def settled() -> float:
    """Return the seconds of a clock, read once the accelerator (if there is one) has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Task:
    """One side of a comparison.

    Attributes:
        run: what is measured.
        reset: runs before every call of ``run`` and is not measured; a task that has one is never looped.
    """

    run: Callable[[], object]
    reset: Callable[[], object] | None = None

    def once(self) -> object:
        """Reset and run."""
        if self.reset is not None:
            self.reset()
        return self.run()


def order_of(names: Sequence[str], round_: int) -> list[str]:
    """Return who goes first, second … in a round. Two sides alternate; three meet every order in six rounds."""
    orders = list(permutations(names))
    return list(orders[round_ % len(orders)])


def interleave(
    tasks: Mapping[str, Task],
    rounds: int,
    *,
    warmup: int = 2,
    budget: float = math.inf,
    clock: Clock = time.perf_counter,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return, for each side, the seconds of one call in each round.

    Garbage is collected between the rounds and never inside one, so that no side pays for another's.

    Args:
        tasks: the sides.
        rounds: how many samples each side gives.
        warmup: rounds before them that are not kept.
        budget: seconds after which no further round starts, once there are :data:`FEWEST_ROUNDS`.
        clock: gives seconds.
        tick: called after every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    loops = {name: _loops(task, clock) for name, task in tasks.items()}
    with _no_garbage_collection():
        start = clock()
        for round_ in range(-warmup, rounds):
            if round_ >= FEWEST_ROUNDS and clock() - start > budget:
                break
            gc.collect()
            for name in order_of(list(tasks), round_):
                sample = _sample(tasks[name], loops[name], clock)
                if round_ >= 0:
                    seconds[name].append(sample)
            tick()
    return seconds


def _sample(task: Task, loops: int, clock: Clock) -> float:
    if task.reset is not None:
        task.reset()
    run = task.run
    start = clock()
    for _ in range(loops):
        run()
    return (clock() - start) / loops


def _loops(task: Task, clock: Clock) -> int:
    if task.reset is not None:
        return 1
    loops = 1
    while True:
        lasted = _sample(task, loops, clock) * loops
        if lasted >= SHORTEST_SAMPLE:
            return loops
        loops *= 4


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already stays; the collections between rounds need not look at it again
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def paired_quartiles(top: Sequence[float], bottom: Sequence[float]) -> tuple[float, float]:
    """Return the quartiles of the ratio within each round; how far a single round strays from the ratio of medians."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(top, bottom, strict=True)], n=4)
    return low, high


def excess(side: Sequence[float], frozen: Sequence[float]) -> float:
    """Return the median over the rounds of what a side takes longer than the frozen base did in the same round."""
    return statistics.median(a - b for a, b in zip(side, frozen, strict=True))
