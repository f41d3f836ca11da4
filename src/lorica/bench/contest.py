"""What a measure is, and how one case of it is taken: checked, counted, timed."""

from __future__ import annotations

import contextlib
import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorica.bench import counting, timing
from lorica.bench.timing import Task
from lorica.errors import LoricaError

FROZEN, PEFT, LORICA = "frozen", "peft", "lorica"
AGAINST_PEFT, AGAINST_FROZEN = "lorica / peft", "lorica / frozen base"

#: Seconds that the timing of one case may take before it makes do with fewer rounds.
BUDGET, QUICK_BUDGET = 8.0, 1.0


class UnequalSidesError(LoricaError):
    """The sides of a comparison do not compute the same, so that their times mean nothing."""

    exit_code = 1


@dataclass(frozen=True)
class Contest:
    """The sides of one case, ready to run.

    Attributes:
        tasks: ``lorica``; ``peft``, where it is installed; ``frozen``, the base model without adapters, where that
            means something.
        rounds: samples of each side, at most; see ``BUDGET``.
        counts: which of ``counting.QUANTITIES`` are taken.
        models: whose parameters do not count as saved, by side.
        tolerance: how far (relative) the results of peft and lorica may lie apart; None where they are random or none.
        close: called at the end, whatever happened.
    """

    tasks: Mapping[str, Task]
    rounds: int
    counts: tuple[str, ...] = ()
    models: Mapping[str, nn.Module] = field(default_factory=dict)
    tolerance: float | None = None
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Case:
    """One row group of a measure's table. ``build`` takes whether the run is a quick one."""

    name: str
    build: Callable[[bool], Contest]

    def take(self, of: Measure, *, quick: bool, tick: Callable[[], object] = lambda: None) -> list[Figure]:
        """Check that both libraries give the same, count, time."""
        return _take(of, self, quick=quick, tick=tick)


@dataclass(frozen=True)
class Measure:
    """One table.

    Attributes:
        name: what ``--only`` takes.
        title: the heading.
        note: what was done and what to know when reading it.
        cases: the row groups.
        sides: the columns, where a case has them.
        against: what the ratio is of.
    """

    name: str
    title: str
    note: str
    cases: tuple[Case, ...]
    sides: tuple[str, ...] = (FROZEN, PEFT, LORICA)
    against: str = AGAINST_PEFT


@dataclass(frozen=True)
class Figure:
    """One row: a quantity on every side.

    Attributes:
        unit: ``s``, ``B`` or empty for a plain number.
        values: side → median or count.
        ratio: lorica / peft (or what the measure compares with); below 1 lorica needs less.
        spread: quartiles of the ratio within a round, for times.
        excess: the ratio of what each adds to the frozen base.
        rounds: samples of each side, for times.
        remark: what happened, where there is no number.
    """

    measure: str
    case: str
    quantity: str
    unit: str
    values: dict[str, float]
    ratio: float | None
    spread: tuple[float, float] | None = None
    excess: float | None = None
    rounds: int | None = None
    remark: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Figure:
        """Return the figure that :meth:`to_json` described."""
        spread = values.get("spread")
        return cls(**{**values, "spread": None if spread is None else tuple(spread)})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings: the comparison calls things on purpose that warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def take(of: Measure, case: Case, *, quick: bool, tick: Callable[[], object] = lambda: None) -> list[Figure]:
    """Take one case.

    Raises:
        UnequalSidesError: the sides do not compute the same.
    """
    return case.take(of, quick=quick, tick=tick)


def _take(of: Measure, case: Case, *, quick: bool, tick: Callable[[], object]) -> list[Figure]:
    with quiet():
        contest = case.build(quick)
        try:
            _same_result(contest, f"{of.name}, {case.name}")
            figures = _counted(of, case, contest)
            budget = QUICK_BUDGET if quick else BUDGET
            seconds = timing.interleave(contest.tasks, contest.rounds, budget=budget, clock=timing.settled, tick=tick)
        finally:
            contest.close()
    return [_timed(of, case, seconds), *figures]


def _same_result(contest: Contest, where: str) -> None:
    results = {name: task.once() for name, task in contest.tasks.items()}
    if contest.tolerance is None or PEFT not in results:
        return
    theirs, ours = results[PEFT], results[LORICA]
    assert isinstance(theirs, Tensor)
    assert isinstance(ours, Tensor)
    scale = theirs.double().norm().item()
    apart = (ours.double() - theirs.double()).norm().item() / scale
    if not apart <= contest.tolerance:
        raise UnequalSidesError(f"{where}: peft and lorica differ by {apart:.1e}, relatively")


def _counted(of: Measure, case: Case, contest: Contest) -> list[Figure]:
    if not contest.counts:
        return []
    counts = count_sides(contest)
    return [_count_figure(of, case, quantity, counts) for quantity in contest.counts]


def count_sides(contest: Contest) -> dict[str, dict[str, int]]:
    """Return the counts of one run of each side."""
    counts = {}
    for name, task in contest.tasks.items():
        reset = task.reset or (lambda: None)
        counts[name] = counting.count(task.run, contest.models.get(name), reset=reset)
    return counts


def _count_figure(of: Measure, case: Case, quantity: str, counts: dict[str, dict[str, int]]) -> Figure:
    values = {side: float(found[quantity]) for side, found in counts.items()}
    over, other = None, _other(values)
    if FROZEN in values and PEFT in values:
        over = ratio_of(values[LORICA] - values[FROZEN], values[PEFT] - values[FROZEN])
    unit = "B" if "bytes" in quantity else ""
    ratio = ratio_of(values[LORICA], values[other]) if other else None
    return Figure(of.name, case.name, quantity, unit, values, ratio, excess=over)


def _timed(of: Measure, case: Case, seconds: dict[str, list[float]]) -> Figure:
    medians = {side: statistics.median(samples) for side, samples in seconds.items()}
    over, other = None, _other(seconds)
    if FROZEN in seconds and PEFT in seconds:
        over = ratio_of(*(timing.excess(seconds[side], seconds[FROZEN]) for side in (LORICA, PEFT)))
    ratio = ratio_of(medians[LORICA], medians[other]) if other else None
    spread = timing.paired_quartiles(seconds[LORICA], seconds[other]) if other else None
    return Figure(of.name, case.name, "time", "s", medians, ratio, spread, over, len(seconds[LORICA]))


def _other(sides: Mapping[str, object]) -> str | None:
    """Return whom lorica is compared with: peft, or where it is not there the frozen base, or nobody."""
    return next((side for side in (PEFT, FROZEN) if side in sides), None)


def ratio_of(top: float, bottom: float) -> float | None:
    """Return the ratio, or None where the other side takes nothing (or, by noise, less than nothing)."""
    return top / bottom if bottom > 0 else None


def seed_everything() -> None:
    """Start from the same random numbers in every run."""
    torch.manual_seed(0)


def take_all(chosen: Sequence[Measure], *, quick: bool, progress: bool = True) -> list[Figure]:
    """Take every case of the chosen measures, with a progress bar on stderr."""
    jobs = [(measure, case) for measure in chosen for case in measure.cases]
    figures: list[Figure] = []
    hidden = None if progress else True  # None: where stderr is no terminal
    with tqdm(total=len(jobs), unit="case", mininterval=0.5, disable=hidden) as bar:
        for measure, case in jobs:
            rounds = 0

            def tick(label: str = f"{measure.name}: {case.name}") -> None:
                nonlocal rounds
                rounds += 1
                bar.set_description(f"{label}, round {rounds}")

            seed_everything()
            bar.set_description(f"{measure.name}: {case.name}")
            figures += take(measure, case, quick=quick, tick=tick)
            gc.collect()
            bar.update()
    return figures
