"""Whose turn it is: any number of threads compute with a model, or one of them changes it.

::

    reading     a forward, or a whole ``generate``; who waits to write goes first, for a while
    holding     the same for a block of any number of forwards, in this thread and in those that it waits for
    changing    one thread at a time works on the adapters: it reads files, computes; forwards go on
    writing     the part of a change that others must not see half done: no forward runs

Each may be entered again by the thread that is in it. A thread that reads may also change something, once the others
that read are done.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import ClassVar

from lorica.errors import AdapterError


class Turns:
    """The turns of one model.

    Attributes:
        reading: a context in which nothing changes; entering it takes half a microsecond where nobody changes anything.
        patience: for how many seconds nobody begins to read, at first, while somebody waits to write.
        glance: after how many seconds who waits looks whether the others are still there.
        told_after: after how many seconds who waits says for whom.
    """

    patience: ClassVar[float] = 1.0
    glance: ClassVar[float] = 1.0
    told_after: ClassVar[float] = 30.0

    def __init__(self) -> None:
        self.reading = _Reading(self)
        self._readers: dict[int, int] = {}  # thread → how often it has entered
        self._holders: dict[int, int] = {}  # those of them that are in blocks
        self._changer: int | None = None
        self._changes = 0  # how often the changer has entered
        self._writes = 0
        self._queue = 0  # those who wait to read
        self._waits = False  # whether the changer waits until nobody else reads
        self._locks: weakref.WeakKeyDictionary[object, threading.RLock] = weakref.WeakKeyDictionary()
        self._begin()
        _ALL.add(self)

    def _begin(self) -> None:
        # A signal handler may run in the middle of anything here, in the same thread: hence the kind of lock.
        self._lock = threading.RLock()
        self._free = threading.Condition(self._lock)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let nothing change inside a ``with`` block, which waits for those who wait to write.

        Forwards of other threads do not wait for these while a block is open: its thread may be waiting for them.
        """
        me = get_ident()
        with self._lock:
            self._enter(me, holds=True)
            self._holders[me] = self._holders.get(me, 0) + 1
            self._free.notify_all()
        try:
            yield
        finally:
            with self._lock:
                _leave(self._holders, me)
                self._exit(me)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let no other thread change anything inside a ``with`` block.

        Raises:
            AdapterError: this thread reads, and another one is changing something, which may be waiting for it.
        """
        me = get_ident()
        with self._lock:
            if self._changer not in (None, me):
                if me in self._readers:
                    raise AdapterError(
                        "adapters cannot be changed or saved here: this thread is in the middle of a forward, a "
                        "`generate` or a `hold_adapters` or `route_rows` block of the model, and another thread is "
                        "changing its adapters. Do it before or after that"
                    )
                self._free.wait_for(lambda: self._changer is None)
            self._changer = me
            self._changes += 1
        try:
            yield
        finally:
            with self._lock:
                self._changes -= 1
                if not self._changes:
                    self._changer = None
                    self._free.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let no other thread change anything, or compute, inside a ``with`` block; wait for those that do.

        Raises:
            AdapterError: see :meth:`changing`.
        """
        me = get_ident()
        with self.changing():
            with self._lock:
                if not self._writes:  # those who waited for the last write come before the next
                    self._free.wait_for(lambda: not self._queue, self.glance)
                self._wait_to_write(me)
                self._writes += 1
            try:
                yield
            finally:
                with self._lock:
                    self._writes -= 1
                    self._free.notify_all()

    def _wait_to_write(self, me: int) -> None:
        """Wait until nobody else reads: for a while nobody begins to, then for as long all may, then for twice as long.

        So forwards that overlap do not keep a change out for ever, a long ``generate`` that it waits for does not keep
        everybody else out, and a thread that a forward waits for comes in.
        """
        patience, left, waited = self.patience, 0.0, 0.0
        try:
            while others := self._readers.keys() - {me}:
                if left <= 0:
                    self._waits, left = not self._waits, patience
                    patience *= 1 if self._waits else 2
                    self._free.notify_all()
                pause = min(left, self.glance)
                self._free.wait_for(lambda: not self._readers.keys() - {me}, pause)
                left, waited = left - pause, waited + pause
                self._forget(others - sys._current_frames().keys())  # those that ended in a block
                if waited >= self.told_after > waited - pause:
                    _tell(others, waited)
        finally:
            self._waits = False

    def _forget(self, threads: set[int]) -> None:
        for counts in (self._readers, self._holders):
            for thread in threads & counts.keys():
                del counts[thread]

    def alone(self, thing: object) -> threading.RLock:
        """Return a lock for a module that a forward changes and puts back, or changes once."""
        found = self._locks.get(thing)
        if found is None:
            with self._lock:
                found = self._locks.setdefault(thing, threading.RLock())
        return found

    def _enter(self, me: int, *, holds: bool = False) -> None:
        if me not in self._readers and self._changer not in (None, me):
            self._queue += 1
            try:
                self._free.wait_for(lambda: self._may_read(holds))
            finally:
                self._queue -= 1
                self._free.notify_all()
        self._readers[me] = self._readers.get(me, 0) + 1

    def _may_read(self, holds: bool) -> bool:
        if self._waits:
            return bool(self._holders) and not holds
        return not self._writes

    def _exit(self, me: int) -> None:
        _leave(self._readers, me)
        if self._changer is not None:
            self._free.notify_all()

    def keep_only(self, thread: int) -> None:
        """Forget all threads but one, in a process that has only this one of those that it was forked from."""
        self._begin()
        self._locks = weakref.WeakKeyDictionary()
        self._forget(self._readers.keys() - {thread})
        self._queue, self._waits = 0, False
        if self._changer != thread:
            self._changer, self._changes, self._writes = None, 0, 0


class _Reading:
    """See :class:`Turns`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __enter__(self) -> None:
        turns, me = self._turns, get_ident()
        before = turns._readers.get(me, 0)
        try:
            with turns._lock:
                if turns._changer is None and not before:  # every forward comes here
                    turns._readers[me] = 1
                else:
                    turns._enter(me)
        except BaseException:  # an interrupt, perhaps after this thread was counted
            if turns._readers.get(me, 0) > before:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        turns = self._turns
        with turns._lock:
            turns._exit(get_ident())


def _leave(counts: dict[int, int], thread: int) -> None:
    count = counts.pop(thread, 0)  # a block that is left long after its thread ended is not there any more
    if count > 1:
        counts[thread] = count - 1


def _tell(threads: set[int], seconds: float) -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    warnings.warn(
        f"A change of a model's adapters has waited for {seconds:.0f} s, and goes on waiting, for the threads "
        f"{[names.get(thread, thread) for thread in threads]}: each is in a forward, a `generate` or a block of "
        "`hold_adapters` or `route_rows`.",
        stacklevel=5,
    )


_ALL: weakref.WeakSet[Turns] = weakref.WeakSet()


def _after_fork() -> None:
    for turns in list(_ALL):
        turns.keep_only(get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["Turns"]
