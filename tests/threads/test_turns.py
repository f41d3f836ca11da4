"""The turns alone: who waits for whom, and that nobody waits for ever."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from meeting import Gate, Running, until

from lorica.errors import AdapterError
from lorica.layers import Switch
from lorica.layers.turns import Turns


class Inside:
    """A thread that enters a context, and leaves it when it is told to."""

    def __init__(self, context: AbstractContextManager[object]) -> None:
        self.entered, self._leave = threading.Event(), threading.Event()
        self._thread = Running(self._run, context)

    def _run(self, context: AbstractContextManager[object]) -> None:
        with context:
            self.entered.set()
            self._leave.wait()

    def may_leave(self) -> None:
        self._leave.set()

    def leave(self) -> None:
        self.may_leave()
        self._thread.result()


def entered(context: AbstractContextManager[object]) -> Inside:
    inside = Inside(context)
    until(inside.entered.is_set)
    return inside


def kept_out(turns: Turns, *contexts: AbstractContextManager[object], beside: int = 0) -> list[Inside]:
    """Threads that wait to enter contexts, beside some that wait already."""
    threads = [Inside(context) for context in contexts]
    until(lambda: len(turns._free._waiters) == beside + len(threads))  # type: ignore[attr-defined]
    assert not any(thread.entered.is_set() for thread in threads)
    return threads


def all_leave(threads: list[Inside]) -> None:
    """Let threads come in and leave, in whichever order they take their turns."""
    for thread in threads:
        thread.may_leave()
    for thread in threads:
        thread.leave()


def passes(context: AbstractContextManager[object]) -> None:
    entered(context).leave()


def test_any_number_read_at_once_and_one_writes() -> None:
    turns = Turns()
    readers = [entered(turns.reading) for _ in range(3)]
    [writer] = kept_out(turns, turns.writing())
    for reader in readers:
        assert not writer.entered.is_set()
        reader.leave()
    until(writer.entered.is_set)
    others = kept_out(turns, turns.reading, turns.holding(), turns.writing(), turns.changing())
    writer.leave()
    all_leave(others)


def test_who_waits_to_write_goes_before_new_readers_but_not_before_those_who_read() -> None:
    turns = Turns()
    go = threading.Event()

    def read_twice() -> None:
        with turns.reading:
            go.wait()
            with turns.reading, turns.holding():
                pass

    first = Running(read_twice)
    until(lambda: turns._readers)
    [writer] = kept_out(turns, turns.writing())
    [late] = kept_out(turns, turns.reading, beside=1)
    go.set()
    first.result()
    until(writer.entered.is_set)
    assert not late.entered.is_set()
    writer.leave()
    until(late.entered.is_set)
    late.leave()


def test_a_change_lets_readers_pass_and_other_changes_wait() -> None:
    turns = Turns()
    change = entered(turns.changing())
    passes(turns.reading)
    passes(turns.holding())
    others = kept_out(turns, turns.changing(), turns.writing())
    passes(turns.reading)
    change.leave()
    all_leave(others)


def test_threads_that_a_block_waits_for_are_not_kept_out() -> None:
    """A block's thread may wait for forwards of others (a pool of workers, autograd): they pass who waits to write."""
    turns = Turns()
    block = entered(turns.holding())
    [writer] = kept_out(turns, turns.writing())
    passes(turns.reading)
    [second] = kept_out(turns, turns.holding(), beside=1)  # or blocks that overlap would keep the writer out for ever
    passes(turns.reading)
    block.leave()
    until(writer.entered.is_set)
    assert not second.entered.is_set()
    writer.leave()
    until(second.entered.is_set)
    second.leave()


def test_who_waits_to_write_lets_others_pass_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a ``generate`` of minutes would keep everybody out, and a forward that waits for another thread's for ever."""
    monkeypatch.setattr(Turns, "patience", 0.01)
    turns = Turns()
    long = entered(turns.reading)
    writer = Inside(turns.writing())
    until(lambda: turns._changer is not None)
    for _ in range(3):
        passes(turns.reading)
    passes(turns.holding())
    assert not writer.entered.is_set()
    long.leave()
    until(writer.entered.is_set)
    writer.leave()


def test_who_waited_for_a_write_comes_before_the_next_one() -> None:
    turns, order = Turns(), []
    queued = threading.Event()

    def write_twice() -> None:
        with turns.writing():
            order.append("write")
            queued.wait()
        with turns.writing():
            order.append("write")

    def read() -> None:
        with turns.reading:
            order.append("read")

    writer = Running(write_twice)
    until(lambda: order)
    reader = Running(read)
    until(lambda: turns._queue)
    queued.set()
    writer.result()
    reader.result()
    assert order == ["write", "read", "write"]


def test_a_thread_that_ended_in_its_turn_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "glance", 0.01)
    turns = Turns()
    block = turns.holding()
    Running(block.__enter__).result()  # a framework forgot to leave it
    Running(turns.reading.__enter__).result()
    passes(turns.writing())
    block.__exit__(None, None, None)  # when it is collected
    passes(turns.writing())
    passes(turns.reading)


def test_who_waits_for_long_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "glance", 0.01)
    monkeypatch.setattr(Turns, "told_after", 0.02)
    turns = Turns()

    def write() -> None:
        with turns.writing():
            raise AssertionError

    here = re.escape(threading.current_thread().name)
    with turns.reading, pytest.raises(UserWarning, match=f"goes on waiting, for the threads \\['{here}'\\]"):
        Running(write).result()  # warnings are errors here
    passes(turns.writing())


def test_an_interrupt_on_the_way_in_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    lock = turns._lock

    class Interrupted:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()
            monkeypatch.setattr(turns, "_lock", lock)
            raise KeyboardInterrupt

    monkeypatch.setattr(turns, "_lock", Interrupted())
    with pytest.raises(KeyboardInterrupt), turns.reading:
        raise AssertionError
    passes(turns.writing())


def test_each_context_may_be_entered_again_in_each_other_one() -> None:
    turns = Turns()
    with turns.writing(), turns.reading, turns.holding(), turns.changing(), turns.writing(), turns.reading:
        pass
    with turns.reading, turns.writing(), turns.holding(), turns.reading, turns.changing():
        pass
    passes(turns.writing())
    passes(turns.reading)


def test_a_reader_may_write_once_the_others_are_done() -> None:
    turns = Turns()
    other = entered(turns.reading)

    def upgrade() -> None:
        with turns.reading, turns.writing():
            pass

    upgrading = Running(upgrade)
    until(lambda: turns._waits)
    [late] = kept_out(turns, turns.reading, beside=1)
    assert not upgrading.done
    other.leave()
    upgrading.result()
    late.leave()


def test_a_reader_does_not_wait_for_a_change_that_may_wait_for_it() -> None:
    turns = Turns()
    go = threading.Event()

    def change_in_the_middle() -> None:
        with turns.reading:
            go.wait()
            with turns.changing():
                raise AssertionError

    reader = Running(change_in_the_middle)
    until(lambda: turns._readers)
    [writer] = kept_out(turns, turns.writing())
    go.set()
    with pytest.raises(AdapterError, match="in the middle of a forward"):
        reader.result()
    until(writer.entered.is_set)
    writer.leave()


@pytest.mark.parametrize("kind", ["reading", "holding", "changing", "writing"])
def test_an_error_inside_ends_the_turn(kind: str) -> None:
    turns = Turns()
    context = turns.reading if kind == "reading" else getattr(turns, kind)()
    with pytest.raises(ZeroDivisionError), context:
        raise ZeroDivisionError
    passes(turns.writing())
    passes(turns.reading)


def test_a_wait_that_is_interrupted_leaves_nothing_behind() -> None:
    turns = Turns()
    other = entered(turns.reading)
    main = threading.get_ident()

    def interrupt() -> None:
        until(lambda: turns._waits)
        signal.pthread_kill(main, signal.SIGINT)

    sender = Running(interrupt)
    with pytest.raises(KeyboardInterrupt), turns.writing():
        raise AssertionError
    sender.result()
    change = entered(turns.changing())
    passes(turns.reading)
    change.leave()
    other.leave()
    passes(turns.writing())


@pytest.fixture
def _quiet_fork() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        yield


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("_quiet_fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have() -> None:
    turns = Turns()
    others = [entered(turns.reading), entered(turns.changing())]
    held = Gate()

    def hold_the_lock() -> None:
        with turns._lock:
            held()

    holder = Running(hold_the_lock)
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        with turns.writing(), turns.reading:
            os._exit(0)
    held.open()
    holder.result()
    _, status = os.waitpid(child, 0)
    all_leave(others)
    assert status == 0


# ---- the switch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda switch: pickle.loads(pickle.dumps(switch))])
def test_a_copy_of_a_switch_has_turns_and_rows_of_its_own(duplicate) -> None:
    from lorica.routing import Rows

    switch = Switch(("a", "b"))
    switch.pending = True
    with switch.turns.writing(), switch.routed(Rows(["a"])):
        other = duplicate(switch)
        passes(other.turns.writing())
        assert other.rows is None
    assert (other.active, other.enabled, other.pending, other.agreed) == (("a", "b"), True, True, False)


def test_blocks_that_turn_adapters_off_may_overlap() -> None:
    switch = Switch()
    first = entered(switch.off())
    second = entered(switch.off())
    first.leave()
    assert not switch.enabled
    second.leave()
    assert switch.enabled
    switch.enabled = False  # by disable_adapter_layers
    passes(switch.off())
    assert not switch.enabled
