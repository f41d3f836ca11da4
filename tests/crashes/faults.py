"""Faults at chosen changes of the file system, by number and not by time: errors of the system, signals, kills.

An audit hook sees each file that is opened for writing, and each mkdir, rename, remove, rmdir and truncate that Python
is about to do; flushes are made visible to it. What is changed outside of the watched directory does not count.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "faults.fsync"}

_watching: Callable[[str], None] | None = None
_root = ""
_reads = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watch, path = _watching, arguments[0] if arguments else None
    if watch is None or not (event in _CHANGES or event == "open"):
        return
    if event == "open" and not arguments[2] & _WRITES:
        if not _reads:
            return
        event = "read"
    if event == "faults.fsync":
        path = os.readlink(f"/proc/self/fd/{path}")
    within_tree = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # a name in an open directory
    if within_tree or (not isinstance(path, int) and os.fspath(path).startswith(_root)):
        watch(f"{event} {os.fspath(path)}")


sys.addaudithook(_hook)


def begin(root: Path, watch: Callable[[str], None], *, reads: bool = False) -> None:
    """Tell ``watch`` each change below ``root``, just before it is made; what it raises is what the change raises.

    Nothing is really flushed: what a process leaves when it dies is in the system's memory.

    Args:
        reads: of files that are opened to be read too.
    """
    global _watching, _root, _reads
    _watching, _root, _reads = watch, str(root), reads
    os.fsync = lambda descriptor: sys.audit("faults.fsync", descriptor)


@contextlib.contextmanager
def watched(root: Path, watch: Callable[[str], None]) -> Iterator[None]:
    """:func:`begin`, for the length of a block."""
    global _watching
    fsync = os.fsync
    begin(root, watch)
    try:
        yield
    finally:
        os.fsync, _watching = fsync, None


def changes(root: Path, work: Callable[[], object]) -> list[str]:
    """Do the work and return the changes that it made, in order."""
    seen: list[str] = []
    with watched(root, seen.append):
        work()
    return seen


@contextlib.contextmanager
def at(root: Path, number: int, act: Callable[[str], object], *, lasting: bool = False) -> Iterator[list[str]]:
    """Let ``act`` happen at the ``number``-th change (from 0), and if ``lasting`` at all later ones; yield what was
    hit."""
    count, hit = 0, []

    def watch(change: str) -> None:
        nonlocal count
        count += 1
        if count == number + 1 or (lasting and count > number):
            hit.append(change)
            act(change)

    with watched(root, watch):
        yield hit


def error(number: int) -> Callable[[str], None]:
    """An error of the system, which names the file, but not where it flushes one."""

    def act(change: str) -> None:
        name = [] if change.startswith("faults.fsync") else [change.split()[-1]]
        raise OSError(number, os.strerror(number), *name)

    return act


def interrupt(signum: int = signal.SIGINT) -> Callable[[str], None]:
    return lambda change: signal.raise_signal(signum)


def kill(change: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], object]) -> int:
    """Do the work in a copy of this process; return the signal that ended it, or 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_at(root: Path, number: int, work: Callable[[], object]) -> bool:
    """Whether a copy of this process dies at the ``number``-th change of the work; else the work is done."""

    def doomed() -> None:
        with at(root, number, kill):
            work()

    return in_child(doomed) == signal.SIGKILL
