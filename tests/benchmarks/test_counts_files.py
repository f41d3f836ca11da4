"""What loading and saving need beside peft, in counts that do not jitter; calls of Python functions among them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from benchmarks.measures import files
from benchmarks.suite import LORICA, PEFT, count_sides, quiet
from lorica.bench.contest import Contest
from lorica.bench.counting import count
from lorica.bench.timing import Task

TENSORS = 2 * 7 * 4  # A and B of the linears of four layers
BYTES = 4 * 16 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 352))  # rank 16, in float32

# Calls per tensor, with what does not depend on their number shared out among so few of them.
CALLS_OF_A_LOAD = 130
CALLS_OF_SAVING = 63  # the journal of files that change together takes some 200 calls, whatever their tensors

LOADERS: dict[str, files.Maker] = {
    "first": files.load_first,
    "first-low": partial(files.load_first, low_cpu_mem_usage=True),
    "further-1": partial(files.load_further, already=1),
    "further-8": partial(files.load_further, already=8),
}


@pytest.fixture
def contest_of() -> Iterator[Callable[..., Contest]]:
    made: list[Contest] = []

    def make(maker: files.Maker) -> Contest:
        with quiet():
            made.append(files.build(True, maker=maker))
        return made[-1]

    yield make
    for contest in made:
        contest.close()


def calls(task: Task) -> int:
    """Return how many Python functions one run calls, after a first run in which things are imported."""
    made = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal made
        made += event == "call"

    with quiet():
        task.once()
        task.reset()
        sys.setprofile(see)
        try:
            task.run()
        finally:
            sys.setprofile(None)
    return made


@pytest.mark.parametrize("loader", LOADERS)
def test_a_load_looks_at_the_file_once_and_copies_nothing(loader, contest_of):
    with quiet():
        counts = count_sides(contest_of(LOADERS[loader]))
    theirs, ours = counts[PEFT], counts[LORICA]
    # One pass over the file for NaN, and its two results; beside it a few numbers, however many tensors there are.
    assert ours["kernels"] <= 8 < TENSORS
    assert theirs["kernels"] >= 3 * TENSORS, "peft is pinned"
    assert BYTES <= ours["bytes moved"] <= 1.001 * BYTES
    assert ours["bytes moved"] <= (0.334 if loader == "first-low" else 0.201) * theirs["bytes moved"]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_load_needs_the_memory_of_the_factors_and_no_more(loader, contest_of):
    contest = contest_of(LOADERS[loader])
    with quiet():
        assert count_sides(contest)[LORICA]["peak bytes"] <= BYTES + 64


def test_a_load_takes_the_same_however_many_adapters_there_are(contest_of):
    one, eight = (calls(contest_of(LOADERS[name]).tasks[LORICA]) for name in ("further-1", "further-8"))
    assert abs(eight - one) <= 0.01 * one


def test_python_calls_of_a_load(contest_of):
    contest = contest_of(LOADERS["further-1"])
    ours, theirs = (calls(contest.tasks[side]) for side in (LORICA, PEFT))
    assert ours <= CALLS_OF_A_LOAD * TENSORS
    assert ours <= 0.08 * theirs


def test_saving_copies_nothing(contest_of):
    contest = contest_of(files.save)
    with quiet():
        contest.tasks[LORICA].once()
        ours = count(contest.tasks[LORICA].run)
    assert (ours["kernels"], ours["bytes moved"], ours["peak bytes"]) == (0, 0, 0)


def test_python_calls_of_saving(contest_of):
    contest = contest_of(files.save)
    ours, theirs = (calls(contest.tasks[side]) for side in (LORICA, PEFT))
    assert ours <= CALLS_OF_SAVING * TENSORS
    assert ours <= 0.22 * theirs
