"""One run at a time in a directory: a lock that the system takes back when its process ends, however it ends.

``flock`` of the standard library, and no lock that is a file's being there: that one would outlive a killed run, and
keep its continuation out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from lorica.errors import RecipeError

NAME = ".lock"
# What file systems without locks say of them.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_POLL_SECONDS = 0.05


class Claim:
    """The right to write into a run's directory, from :meth:`take` to the end of the block.

    Args:
        output: the directory.
        patience: seconds to wait for whoever has it: ranks that replace others may come before those are gone.
    """

    def __init__(self, output: Path, *, patience: float = 0.0) -> None:
        self._path, self._patience = output / NAME, patience
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether the directory is ours; also where its file system knows no locks."""
        return self._descriptor is not None

    def take_if_used(self) -> None:
        """Claim the directory if a run, maybe one that is going on, was begun in it; else write nothing."""
        if self._path.exists():
            self.take()

    def take(self) -> None:
        """Claim the directory, which has to be there.

        Raises:
            RecipeError: another process has it, or it cannot be written.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RecipeError(f"output_dir: {self._path} cannot be written: {error.strerror}") from None
        try:
            self._wait_for(descriptor)
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _wait_for(self, descriptor: int) -> None:
        deadline = time.monotonic() + self._patience
        while not _locked(descriptor):
            if time.monotonic() >= deadline:
                who = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                raise RecipeError(
                    f"output_dir: {who} is training into {self._path.parent}. Wait for it, stop it, or choose another "
                    "output_dir"
                )
            time.sleep(_POLL_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return True


__all__ = ["NAME", "Claim"]
