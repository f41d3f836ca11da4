"""Every figure that was aimed at is a row of the tables, and the page says of each whether it is reached."""

from __future__ import annotations

import pytest

import benchmarks.measures
from benchmarks.suite import FROZEN, LORICA, MEASURES, PEFT, Figure
from benchmarks.targets import READINGS, TARGETS, Target, section

assert benchmarks.measures.__all__  # imported for what it enters into the registry


def figure(case: str, quantity: str, frozen: float, theirs: float, ours: float) -> Figure:
    values = {FROZEN: frozen, PEFT: theirs, LORICA: ours}
    return Figure("toy", case, quantity, "", values, ours / theirs, None, (ours - frozen) / (theirs - frozen))


ROWS = [figure("one", "time", 1.0, 3.0, 2.0), figure("one", "kernels", 2, 12, 10), figure("two", "time", 1.0, 3.0, 2.5)]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.measure}, {t.case}: {t.quantity}, {t.reading}")
def test_a_target_names_what_is_measured(target: Target) -> None:
    assert target.reading in READINGS
    cases = {case.name for case in MEASURES[target.measure].cases}
    assert target.case in cases
    assert (target.beside in cases) is (target.reading == "beside")
    assert (target.beside in MEASURES[target.measure].sides) is (target.reading == "of side")


def test_no_row_has_two_bounds_for_one_reading() -> None:
    names = [(t.measure, t.case, t.quantity, t.reading) for t in TARGETS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("reading", "quantity", "value"),
    [
        ("ratio", "time", 2 / 3),
        ("excess", "time", 0.5),
        ("speed", "time", 1.5),
        ("of frozen", "time", 2.0),
        ("added", "kernels", 8),
        ("own", "kernels", 10),
        ("beside", "time", 2.0 / 2.5),
        ("of side", "time", 2.0 / 3.0),
    ],
)
def test_readings(reading: str, quantity: str, value: float) -> None:
    rows = {(row.measure, row.case, row.quantity): row for row in ROWS}
    target = Target(
        "", "toy", "one", quantity, reading, value, beside={"beside": "two", "of side": PEFT}.get(reading, "")
    )
    found = target.value(rows)
    assert found == pytest.approx(value)
    assert target.reached(value)
    beyond = value * (0.99 if reading == "speed" else 1.01)
    assert not target.reached(beyond)
    assert target.value({}) is None


def test_the_page_says_what_is_reached_and_why_not() -> None:
    targets = [
        Target("Steps", "toy", "one", "time", "excess", 0.65),
        Target("Steps", "toy", "one", "time", "speed", 2.0, why="half of it is the disk"),
        Target("Others", "toy", "three", "time", "ratio", 1.0),
    ]
    text = section(ROWS, targets)
    assert "| Steps | `toy`, one: time | ≤ 0.65 × the other's excess over the frozen base | 0.5 × | yes |" in text
    assert "|  | `toy`, one: time | ≥ 2 × faster | 1.5 × | **no** |" in text
    assert "- `toy`, one, time: half of it is the disk." in text
    assert "| Others | `toy`, three: time | ≤ 1 × the other's | not measured | – |" in text
