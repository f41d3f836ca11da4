"""Being asked to stop: SIGINT and SIGTERM become a question that the loop asks between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from lorica.errors import LoricaError


class Interrupted(LoricaError):
    """The run stopped at a signal, after it wrote a checkpoint."""

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        self.signum, self.step, self.checkpoint = signum, step, checkpoint
        super().__init__(f"Stopped by {signal.Signals(signum).name} after step {step}; the state is in {checkpoint}.")

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that a signal ended."""
        return 128 + self.signum


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one acts as it would without us.

    Outside the main thread, where Python allows no handlers, it never asks to stop.

    Args:
        agree: on several ranks, gives the largest of all ranks' numbers, so that all stop at the same step. A second
            signal is then only noted too: ranks are told by their launcher and often also by who told that.

    Attributes:
        signum: the signal to stop at, once asked.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signum: int | None = None
        self._noted = 0
        self._agree = agree
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        if self.signum is None:
            self.signum = (self._agree(self._noted) if self._agree is not None else self._noted) or None
        return self.signum is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._noted = signum
        if self._agree is None:
            self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
