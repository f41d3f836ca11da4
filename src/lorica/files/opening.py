"""Opening files that strangers gave: regular ones only, and only those that lie in the directory that was named.

A pipe or a device would keep its reader waiting or never end; a link may lead anywhere on the reader's machine.
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from lorica.errors import CheckpointError


def open_regular(path: str | os.PathLike[str]) -> FileIO:
    """Open a regular file to be read, without buffer.

    Raises:
        CheckpointError: it is a directory, a pipe, a device or a socket, is not there, or cannot be read.
    """
    try:
        _refuse_special(path, os.stat(path).st_mode)  # before it is opened: that alone may do something to a device
        file = FileIO(os.fspath(path), "rb", opener=_without_waiting)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        _refuse_special(path, os.fstat(file.fileno()).st_mode)  # somebody may have put another one there
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _refuse_special(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")


def read_fully(file: FileIO, length: int) -> bytes:
    """Return the next ``length`` bytes, or fewer where the file ends before."""
    parts = []
    while length and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def refuse_links_out(path: Path, root: str | os.PathLike[str] | None = None) -> None:
    """Refuse a file that links lead to somewhere else than ``root``, or than its own directory.

    In a snapshot of the hub's cache, files are links to the blobs of the same repository; these are its own.

    Raises:
        CheckpointError: names where the link leads.
    """
    root = path.parent if root is None else Path(root)
    if path.parent == root and not path.is_symlink():
        return  # as nearly all files
    try:
        real, home = path.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is either of the first two
        raise CheckpointError(f"{path}: cannot be followed: {error}") from error
    if real.is_relative_to(home):
        return
    snapshot = next((parent for parent in (home, *home.parents) if parent.parent.name == "snapshots"), None)
    if snapshot is None or not real.is_relative_to(snapshot.parent.parent / "blobs"):
        raise CheckpointError(
            f"{path}: a link that leads out of {root}, to {real}; copy the file there if it is meant to be read"
        )


__all__ = ["open_regular", "read_fully", "refuse_links_out"]
