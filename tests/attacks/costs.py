"""What something costs, in seconds and bytes, on a machine that may be slow or busy; every bound of time goes this way.

A bound of a second is meant for the machine that ``YARD`` is of. So a cost is what this process did itself, not what it
waited for, nor what collecting old garbage took. What is too slow is tried again from the beginning, and compared with
how long the yardsticks take now: beside others that use its caches and memory, a processor does less.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import regex

MIB = 2**20
SECONDS, MEMORY = 1.0, 200 * MIB
TRIES = 3
#: What has used the processor for so long, or ten times as long at all, is a hang, and is ended.
HANG = 20.0
T = TypeVar("T")
_LIBC = ctypes.CDLL(None)


class HangError(BaseException):
    """Something that does not end."""


def bounded(run: Callable[[], T], seconds: float = SECONDS, memory: int = MEMORY) -> tuple[T, str]:
    """Run, and again where it took too much; what hangs is ended by HangError.

    Returns:
        what it returned, and what it took too much of each time ("" where it did not).
    """
    result, excess = _once(run, seconds, memory)
    for _ in range(TRIES - 1):
        if not excess:
            break
        _forget()
        result, excess = _once(run, seconds, memory)
    return result, excess


def _once(run: Callable[[], T], seconds: float, memory: int) -> tuple[T, str]:
    _LIBC.malloc_trim(0)  # what others have given back is not taken again unseen
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    with ending(), _without_old_garbage():
        clock = Clock()
        result = run()
        took = clock.seconds()
    most = _memory("VmHWM") - before
    if most > memory:
        return result, f"it took {most / MIB:.0f} MiB"
    if took > seconds and took > seconds * (slower := slowness()):
        return result, f"it took {took:.2f} s, where the machine is {slower:.2f} times as slow as the bound is for"
    return result, ""


class Clock:
    """What this process does from now on."""

    def __init__(self) -> None:
        self._wall, self._processor = _unwaited(), time.process_time()

    def seconds(self) -> float:
        """Return the shorter of what its threads worked, which may be several, and what went by while it could run."""
        return min(_unwaited() - self._wall, time.process_time() - self._processor)


def _unwaited() -> float:
    """Return the time less what this process waited for a processor, in seconds."""
    while True:
        before, now = _waited(), time.perf_counter()
        if _waited() == before:  # it did not wait between the two
            return now - before / 1e9


def _waited() -> int:
    """Return for how many nanoseconds this process waited for a processor, by the scheduler's account."""
    return int(Path("/proc/self/schedstat").read_text().split()[1])


def _memory(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


@contextmanager
def _without_old_garbage() -> Iterator[None]:
    """Let a collection in the block look at what is made in it, and not at all that tests have imported and left."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _forget() -> None:
    """Forget what a first try has worked out."""
    re.purge()
    regex.purge()
    for module in [module for name, module in [*sys.modules.items()] if name.startswith("lorica.")]:
        for value in [*vars(module).values()]:
            getattr(value, "cache_clear", int)()


# ---- what does not end ----------------------------------------------------------------------------------------------


def _ring(*_: object) -> None:
    raise HangError("it does not end")


@contextmanager
def ending(seconds: float | None = None) -> Iterator[None]:
    """Raise HangError in what works for too long, or waits for something that does not come."""
    seconds = HANG if seconds is None else seconds
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 10 * seconds))
    before = [signal.signal(number, _ring) for number, _, _ in timers]
    try:
        for _, timer, after in timers:
            signal.setitimer(timer, after)
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


# ---- how slow the machine is now ------------------------------------------------------------------------------------

_VALUES = {f"model.layers.{number}.self_attn.q_proj": [number, 1.5, None, "text"] for number in range(1500)}
_TEXT = json.dumps(_VALUES)
_PATTERN = re.compile(r"(?:[a-z]+\.)*layers\.(\d+)\.(?:mlp|self_attn)\.(?:k|v|q)_proj")


def _objects() -> None:
    found: dict[str, list[tuple[int, str]]] = {}
    for number in range(27_000):
        found.setdefault(f"{number % 700}", []).append((number, "x" * (number % 7)))
    sorted(found, key=len)


def _json() -> None:
    for _ in range(14):
        json.loads(_TEXT)


def _expressions() -> None:
    for _ in range(18):
        [_PATTERN.fullmatch(name) for name in _VALUES]


def _space() -> None:
    bytes(bytearray(b"x" * 6_000_000)).count(b"y")


def _files() -> None:
    for _ in range(900):
        with Path(__file__).open("rb") as file:
            os.fstat(file.fileno())
            file.read(4096)


#: What refusals are made of; each takes so many seconds on the machine that bounds are for, undisturbed.
YARDSTICKS = (_objects, _json, _expressions, _space, _files)
YARD = 0.01
_ROUNDS = 4


def slowness() -> float:
    """Return how many times as long as it should what is slowed most takes now; never less than 1."""
    times = [0.0] * len(YARDSTICKS)
    with _without_old_garbage():
        for _ in range(_ROUNDS):
            for place, work in enumerate(YARDSTICKS):
                clock = Clock()
                work()
                times[place] += clock.seconds()
    return max(1.0, max(times) / (_ROUNDS * YARD))
