"""The measure of the other tests finds what is too slow or too large, and nothing else, however busy the machine is."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time
from collections.abc import Iterator

import costs
import pytest
from costs import MIB, HangError, bounded, ending, slowness

from lorica.config import expressions


def _work(seconds: float) -> None:
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass


def test_what_is_too_slow_each_time_is_found() -> None:
    tries = itertools.count()
    _, excess = bounded(lambda: (_work(0.3), next(tries)), 0.003)  # no machine is a hundred times as slow
    assert excess.startswith("it took 0.3")
    assert next(tries) == costs.TRIES


def test_what_is_slow_once_was_disturbed() -> None:
    times = iter([0.3, 0.0])
    result, excess = bounded(lambda: (_work(next(times)), "result")[1], 0.003)
    assert (result, excess) == ("result", "")


def test_waiting_is_no_work() -> None:
    assert bounded(lambda: time.sleep(0.1), 0.05)[1] == ""


def test_what_others_left_is_not_counted() -> None:
    """Not collecting it, nor its memory."""
    held = b"x" * (300 * MIB)
    gc.disable()
    for _ in range(100_000):
        ring: list[object] = []
        ring.append(ring)
    found = bounded(lambda: (gc.enable(), [[number] for number in range(20_000)], gc.collect())[2])
    assert found == (0, "")
    assert gc.collect() >= 100_000
    assert len(held) == 300 * MIB


def test_memory_that_was_given_back_is_found() -> None:
    assert bounded(lambda: len(b"x" * (150 * MIB)), memory=50 * MIB)[1].startswith("it took 1")


@pytest.mark.parametrize("slower", [1.0, 3.0])
def test_the_bound_is_that_of_a_machine_so_busy(slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "YARDSTICKS", (lambda: None, lambda: _work(slower * costs.YARD)))
    assert slower <= slowness() < slower + 1
    assert (bounded(lambda: _work(0.1), 0.05)[1] == "") == (slower == 3.0)


def test_a_quick_machine_has_no_tighter_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "YARDSTICKS", (lambda: None,))
    assert slowness() == 1.0


def test_another_try_begins_from_nothing() -> None:
    """What was worked out the first time would be cheap the second time."""
    misses = []

    def run() -> None:
        expressions.matcher("target_modules", "(a|b)*c|d*(e|f)*", "ending")
        misses.append(expressions._compiled.cache_info().misses)
        _work(0.1)

    expressions._compiled.cache_clear()
    bounded(run, 0.001)
    assert misses == [1] * costs.TRIES


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    both = os.pipe()
    yield both
    for end in both:
        os.close(end)


@pytest.mark.parametrize("hang", ["works", "waits"])
def test_what_does_not_end_is_ended(hang: str, pipe: tuple[int, int]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)]
    with pytest.raises(HangError), ending(0.1 if hang == "works" else 0.02):
        _work(1000) if hang == "works" else os.read(pipe[0], 1)
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)] == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
