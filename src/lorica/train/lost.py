"""Which rank of a run was lost, and why: one that fails leaves a note, one that dies gives no more signs of life."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lorica.engines.board import Board, is_lost
from lorica.errors import LostRankError
from lorica.train.signals import Interrupted

#: Seconds between a rank's signs of life.
BEAT = 1.0
#: Seconds without a sign of life after which a rank counts as dead, once its answer is missed.
PATIENCE = 5.0

_FAILED, _ALIVE, _WAITED = "failed", "alive", "waited"
_LONGEST = 500  # characters of another rank's error


class Company:
    """The ranks of a run, as far as they have met."""

    def __init__(self) -> None:
        self._board: Board | None = None
        self._beats: _Beats | None = None

    def met(self) -> None:
        """Give signs of life from now on; all ranks have met and call this."""
        self._board = Board.of_all("run")
        if self._board is not None:
            self._beats = _Beats(self._board.own_connection())

    def left(self) -> None:
        """Give no more signs of life."""
        if self._beats is not None:
            self._beats.stop()

    def tell(self, error: BaseException) -> None:
        """Leave a note for those who will miss this rank's answer: the first of all ranks' counts."""
        if self._board is not None:
            with contextlib.suppress(RuntimeError):  # the store may be gone, and the error is told in any case
                said = f"{type(error).__name__}: {error}"[:_LONGEST]
                self._board.first(_FAILED, f"rank {self._board.rank} failed: {said}")

    def cause(self) -> str:
        """Say who is missing, and why; empty where nobody can tell."""
        if self._board is None:
            return ""
        try:
            if self._board.read(_FAILED) is None and (missing := self._missing(self._board)):
                # Who waits for this rank finds out once this one has left, and is not to take it for the cause.
                self._board.first(_FAILED, missing)
            return self._board.read(_FAILED) or ""
        except RuntimeError:
            return "the store of the ranks is gone with the process that kept it, rank 0 or its launcher"

    def _missing(self, board: Board) -> str:
        """Say which ranks are dead; else which do not miss an answer as this one does. Empty: another rank knows."""
        board.post(_WAITED, "")
        before, others = board.posted(_ALIVE), set(range(board.size)) - {board.rank}
        silent, absent = others, others
        deadline = time.monotonic() + PATIENCE
        while (silent or absent) and time.monotonic() < deadline:
            time.sleep(BEAT / 4)
            now = board.posted(_ALIVE)
            silent = {rank for rank in silent if now.get(rank) == before.get(rank)}
            absent = absent if silent else absent - board.posted(_WAITED).keys()
            if board.read(_FAILED) is not None:
                return ""
        if silent:
            return f"{_named(silent)} gave no sign of life for {PATIENCE:g} s"
        return f"{_named(absent)} lives and does something else" if absent else ""


class _Beats:
    """A thread that counts up this rank's sign of life."""

    def __init__(self, board: Board) -> None:
        self._board, self._stopped = board, threading.Event()
        self._board.post(_ALIVE, "0")
        self._thread = threading.Thread(target=self._beat, name="lorica-signs-of-life", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone, with rank 0 or the launcher
            while not self._stopped.wait(BEAT):
                count += 1
                self._board.post(_ALIVE, str(count))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)


@contextmanager
def answered() -> Iterator[Company]:
    """Turn what the backends raise when a rank is lost or silent into an error that names it, and let others know of
    an error here.

    Raises:
        LostRankError: a collective failed.
    """
    company = Company()
    try:
        yield company
    except BaseException as error:
        if is_lost(error) or isinstance(error, LostRankError):
            raise LostRankError(said_of_lost(error, company.cause())) from error
        if not isinstance(error, Interrupted):  # which all ranks are together
            company.tell(error)
        raise
    finally:
        company.left()


def said_of_lost(error: BaseException, cause: str = "") -> str:
    """That another rank did not answer: which and why, if that is known, and what the backend says of it."""
    said = _PLACE.sub("", next(iter(str(error).splitlines()), "")).partition(". This is typically caused by")[0]
    return f"rank {os.environ.get('RANK', '0')} got no answer from another rank: " + (
        f"{cause} ({said})" if cause else said
    )


def _named(ranks: set[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, sorted(ranks)))}"


#: Where in a backend's source an error comes from.
_PLACE = re.compile(r"^\[[^\]]*\.cc:\d+\] ")
