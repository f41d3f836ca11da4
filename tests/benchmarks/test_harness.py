"""The harness itself: it counts known operations right, and its timing gives known ratios."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import nn

import benchmarks.measures
from benchmarks.suite import MEASURES
from lorica.bench import chart, contest, report
from lorica.bench.contest import FROZEN, LORICA, PEFT, Case, Contest, Figure, Measure
from lorica.bench.counting import KernelCounter, SavedBytes, count, tensor_bytes
from lorica.bench.timing import Task, excess, interleave, order_of

FP32 = 4

assert benchmarks.measures.__all__  # imported for what it enters into the registry


# ---- counting -------------------------------------------------------------------------------------------------------


def test_a_product_has_known_counts():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count(lambda: a @ b) == {
        "FLOPs": 2 * 3 * 5 * 7,
        "kernels": 1,
        "bytes moved": (15 + 35 + 21) * FP32,
        "saved bytes": 0,
        "peak bytes": 21 * FP32,
    }


def test_an_in_place_product_is_not_free():
    y, a, b = torch.randn(3, 7), torch.randn(3, 5), torch.randn(5, 7)
    counts = count(lambda: y.addmm_(a, b))
    assert counts["FLOPs"] == 2 * 3 * 5 * 7
    assert counts["bytes moved"] == (15 + 35 + 21 + 21) * FP32, "it reads and writes y"
    assert counts["peak bytes"] == 0
    batch = torch.randn(2, 3, 7)
    assert count(lambda: batch.baddbmm_(torch.ones(2, 3, 5), torch.ones(2, 5, 7)))["FLOPs"] == 2 * 2 * 3 * 5 * 7


def test_views_and_allocations_are_no_kernels():
    x = torch.randn(4, 6)
    assert count(lambda: x.view(2, 12).t()[0].detach())["kernels"] == 0
    assert count(lambda: torch.ops.aten._unsafe_view(x, [6, 4]))["kernels"] == 0
    allocated = count(lambda: torch.empty(4, 6))
    assert (allocated["kernels"], allocated["bytes moved"], allocated["peak bytes"]) == (0, 0, 24 * FP32)
    assert count(lambda: torch.ones(4, 6, device="meta") * 2)["kernels"] == 0


def test_bytes_of_what_is_overwritten_expanded_or_given_twice():
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    assert count(lambda: x.copy_(y))["bytes moved"] == 2 * 24 * FP32, "copy_ does not read what it writes over"
    assert count(lambda: x.zero_())["bytes moved"] == 24 * FP32
    assert count(lambda: torch.add(x, y, out=torch.empty(4, 6)))["bytes moved"] == 3 * 24 * FP32
    assert count(lambda: x * x)["bytes moved"] == 2 * 24 * FP32
    assert tensor_bytes(torch.ones(1, 6).expand(4, 6)) == 6 * FP32
    assert tensor_bytes(torch.ones(0, 6)) == 0
    square = torch.randn(6, 6)
    assert count(lambda: square @ square.t())["bytes moved"] == 3 * 36 * FP32, "two orientations are two reads"


def test_peak_is_what_lives_at_once():
    x = torch.randn(100)

    def chained() -> torch.Tensor:
        y = x + 1
        y = y + 1
        return y + 1

    def kept() -> list[torch.Tensor]:
        return [x + 1, x + 1, x + 1]

    assert count(chained)["peak bytes"] == 2 * 100 * FP32
    assert count(kept)["peak bytes"] == 3 * 100 * FP32
    with KernelCounter() as counter:
        held = kept()
        assert counter.live_bytes == 3 * 100 * FP32
        held.pop()
        assert counter.live_bytes == 2 * 100 * FP32


def test_saved_bytes_are_distinct_and_without_parameters():
    linear = nn.Linear(5, 7)
    x = torch.randn(3, 5)
    with SavedBytes(linear) as saved:
        linear(x)
    assert saved.total == x.numel() * FP32, "the input; the weight is a parameter and stays anyhow"
    x.requires_grad_()
    with SavedBytes() as saved:
        x * x
    assert saved.total == x.numel() * FP32, "saved twice, held once"


def test_what_was_saved_and_let_go_counts_though_another_lies_in_its_place():
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes() as saved:
        for _ in range(50):
            (x + 1).square()
    assert saved.total == 50 * x.numel() * FP32


def test_the_backward_is_counted_too():
    linear = nn.Linear(5, 7, bias=False)
    linear.weight.requires_grad_(False)
    x = torch.randn(3, 5)
    gradient = torch.ones(3, 7)
    counts = count(lambda: linear(x.detach().requires_grad_()).backward(gradient), linear)
    assert (counts["FLOPs"], counts["kernels"]) == (2 * 2 * 3 * 5 * 7, 2)


# ---- timing ---------------------------------------------------------------------------------------------------------


class Machine:
    """A clock that tasks move forward, on a machine that gets slower and slower."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now = 0.0
        self.drift = drift
        self.ran: list[str] = []

    def work(self, name: str, seconds: float) -> None:
        self.ran.append(name)
        self.now += seconds * (1 + self.drift * len(self.ran))

    def task(self, name: str, seconds: float) -> Task:
        return Task(lambda: self.work(name, seconds), reset=lambda: None)


def test_waits_give_their_ratio():
    machine = Machine()
    tasks = {LORICA: machine.task("l", 0.004), PEFT: machine.task("p", 0.012)}
    seconds = interleave(tasks, 9, clock=lambda: machine.now)
    figure = contest._timed(_measure(), _case(), seconds)
    assert figure.ratio == pytest.approx(1 / 3, rel=1e-6)
    assert all(len(samples) == 9 for samples in seconds.values())


def test_what_slows_the_machine_slows_both_sides_alike():
    machine = Machine(drift=0.05)
    tasks = {FROZEN: machine.task("f", 1.0), PEFT: machine.task("p", 2.0), LORICA: machine.task("l", 1.5)}
    seconds = interleave(tasks, 60, warmup=0, clock=lambda: machine.now)
    assert seconds[FROZEN][-1] > 5 * seconds[FROZEN][0], "the machine did get slower"
    figure = contest._timed(_measure(), _case(), seconds)
    assert figure.ratio == pytest.approx(0.75, rel=0.02)
    assert figure.excess == pytest.approx(0.5, rel=0.05)


def test_sides_take_turns():
    assert [order_of("AB", n) for n in range(2)] == [["A", "B"], ["B", "A"]]
    orders = {tuple(order_of("ABC", n)) for n in range(6)}
    assert orders == set(permutations("ABC"))
    machine = Machine()
    interleave({"A": machine.task("A", 1), "B": machine.task("B", 1)}, 2, warmup=2, clock=lambda: machine.now)
    assert "".join(machine.ran) == "ABBAABBA" or "".join(machine.ran) == "BAABBAAB"


def test_resets_are_not_measured_and_short_calls_are_looped():
    machine = Machine()
    reset = Task(lambda: machine.work("run", 1.0), reset=lambda: machine.work("reset", 100.0))
    assert interleave({"A": reset}, 3, clock=lambda: machine.now)["A"] == pytest.approx([1.0, 1.0, 1.0])
    machine = Machine()
    short = Task(lambda: machine.work("short", 1e-6))
    assert interleave({"A": short}, 2, clock=lambda: machine.now)["A"] == pytest.approx([1e-6, 1e-6])
    assert len(machine.ran) > 2e-3 / 1e-6


def test_the_budget_ends_a_case_but_never_before_every_order_was_met():
    machine = Machine()
    tasks = {"A": machine.task("A", 1.0), "B": machine.task("B", 1.0)}
    assert len(interleave(tasks, 50, warmup=0, budget=20.0, clock=lambda: machine.now)["A"]) == 11
    assert len(interleave(tasks, 50, warmup=0, budget=0.0, clock=lambda: machine.now)["A"]) == 6


def test_excess_is_taken_within_each_round():
    assert excess([3.0, 33.0, 5.0], [1.0, 30.0, 4.0]) == 2.0


# ---- cases and pages ------------------------------------------------------------------------------------------------


def _measure() -> Measure:
    return Measure("toy", "A toy", "", ())


def _case(theirs: float = 1.0, ours: float = 1.0) -> Case:
    results = {PEFT: torch.tensor([theirs]), LORICA: torch.tensor([ours])}

    def build(quick: bool) -> Contest:
        tasks = {side: Task(lambda side=side: results[side] * 1) for side in results}
        return Contest(tasks, rounds=3, counts=("kernels", "bytes moved"), tolerance=1e-6)

    return Case("one", build)


def test_a_case_gives_a_time_and_its_counts():
    figures = contest.take(_measure(), _case(), quick=True)
    assert [(f.quantity, f.ratio) for f in figures[1:]] == [("kernels", 1.0), ("bytes moved", 1.0)]
    assert figures[0].quantity == "time"


def test_sides_that_compute_different_things_are_not_compared():
    with pytest.raises(contest.UnequalSidesError, match="differ by"):
        contest.take(_measure(), _case(ours=1.1), quick=True)


def _figure(name: str, quantity: str, ratio: float, spread: tuple[float, float] | None = None) -> Figure:
    return Figure(name, "one", quantity, "", {PEFT: 1.0, LORICA: ratio}, ratio, spread)


def test_the_page_says_where_lorica_needs_more(tmp_path):
    name = next(iter(MEASURES))
    worse, noisy, better = (
        _figure(name, "saved bytes", 1.5),
        _figure(name, "time", 1.3, (0.9, 1.7)),
        _figure(name, "kernels", 0.5),
    )
    assert [report.needs_more(figure) for figure in (worse, noisy, better)] == [True, False, False]
    page = tmp_path / "RESULTS.md"
    report.write_markdown(
        page, report.Results({"command": "make bench"}, [worse, noisy, better], MEASURES), "results.png"
    )
    text = page.read_text(encoding="utf-8")
    assert f"- {name}, one: saved bytes 1.50" in text
    for quantity in ("saved bytes", "time", "kernels"):
        assert f"| {quantity} |" in text, "no row is ever dropped"


def test_values_are_shown_with_units():
    shown = [report.show(*value) for value in ((0.00123, "s"), (2e-6, "s"), (1234, "B"), (4.567e6, "B"), (12, ""))]
    assert shown == ["1.23 ms", "2 µs", "1,234 B", "4.57 MB", "12"]


def test_cases_have_names_of_their_own():
    for measure in MEASURES.values():
        names = [case.name for case in measure.cases]
        assert len(set(names)) == len(names)
        assert measure.note


def _rows(counts: dict[str, int]) -> list[Figure]:
    return [_figure(name, "time", 0.5, (0.4, 0.6)) for name, count in counts.items() for _ in range(count)]


def test_the_chart_stays_readable(tmp_path):
    """Each measure has a heading; many rows stand in two columns of about the same height, no measure torn apart."""
    few = chart.lines_of(_rows({"a": 3, "b": 2}))
    assert [line.label for line in few if line.time is None] == ["a", "b"]
    assert chart.columns_of(few) == [few]
    many = chart.lines_of(_rows({"a": 20, "b": 25, "c": 10, "d": 20}))
    left, right = chart.columns_of(many)
    assert left + right == many
    assert (left[0].label, right[0].label) == ("a", "c")
    one = chart.lines_of(_rows({"a": 50}))
    assert chart.columns_of(one) == [one]
    measures = {name: Measure(name, name, "", ()) for name in "abcd"}
    for figures in (_rows({"a": 20, "b": 25}), []):
        chart.draw(tmp_path / "chart.png", figures, measures, "a title")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
