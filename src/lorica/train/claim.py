"""One run at a time in a directory: a lock that ends with the process, or it would keep the run's continuation out."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from lorica.errors import RecipeError
from lorica.files.locks import wait_for_lock

NAME = ".lock"


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
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RecipeError(f"output_dir: {self._path} cannot be written: {error.strerror}") from None
        try:
            if not wait_for_lock(descriptor, self._patience):
                who = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                raise RecipeError(
                    f"output_dir: {who} is training into {self._path.parent}. Wait for it, stop it, or choose another "
                    "output_dir"
                )
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


__all__ = ["NAME", "Claim"]
