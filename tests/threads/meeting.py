"""Threads that meet at chosen points, so that a race is run and not waited for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Longer than anything here takes on a busy machine; a thread that waits longer is stuck.
PATIENCE = float(os.environ.get("MEETING_PATIENCE", 60))


class Running:
    """A function that runs in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, args, kwargs), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._result = function(*args, **kwargs)
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What the function returned; what it raised is raised here."""
        self._thread.join(PATIENCE)
        assert self.done, "a thread is stuck"
        if self._error is not None:
            raise self._error
        return self._result


def until(condition: Callable[[], Any]) -> None:
    """Wait for something that no event tells."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.0005)


class Gate:
    """A point at which the first thread that comes stops until it is let go."""

    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()
        self._first = threading.Lock()

    def __call__(self, *args: Any) -> None:
        if self._first.acquire(blocking=False):
            self._reached.set()
            assert self._open.wait(PATIENCE), "nobody opened the gate"

    def wait(self) -> None:
        """Wait for the thread that is to stop here."""
        assert self._reached.wait(PATIENCE), "nobody came to the gate"

    def open(self) -> None:
        """Let it go on."""
        self._open.set()


def meet_at(module: nn.Module, threads: int) -> None:
    """Let forwards of a module begin together, so many at a time."""
    barrier = threading.Barrier(threads, timeout=PATIENCE)

    def meet(*args: Any) -> None:
        barrier.wait()

    module.register_forward_pre_hook(meet)


@contextmanager
def stopping_at(module: nn.Module) -> Iterator[Gate]:
    """Stop the first forward of a module, before it begins."""
    gate = Gate()
    handle = module.register_forward_pre_hook(gate)
    try:
        yield gate
    finally:
        gate.open()
        handle.remove()
