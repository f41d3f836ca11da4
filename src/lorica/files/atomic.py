"""Writing so that a crash at any moment leaves either the old file or the new one, never a half.

A file is written under a temporary name in the same directory, flushed to the disk, and renamed over the old one
(``rename`` is atomic on POSIX file systems). A directory of several files is complete only once its marker is there:
it is filled under a temporary name, the marker is written last, and then the directory gets its final name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.files import tensors as safetensors

MARKER = "COMPLETE"
_TEMPORARY = ".partial-"


def sync(path: Path) -> None:
    """Flush a file's or directory's data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: str | os.PathLike[str], writer: Callable[[Path], None]) -> None:
    """Let ``writer`` fill a temporary file, then put it in place of ``path`` in one step.

    Raises:
        OSError: the directory is not writable or the disk is full; ``path`` is then as it was.
    """
    with at_once():
        path = Path(path)
        temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}{path.suffix}"
        _OPEN.get().append((temporary, path))
        writer(temporary)


#: Temporary files that are to be flushed and renamed at the end of the outermost :func:`at_once`, and their names then.
_OPEN: ContextVar[list[tuple[Path, Path]]] = ContextVar("open")


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Put all files that are written inside the block in their places at its end, in the order they were written in;
    if it or a flush fails, none.

    All are flushed at the same time, which costs the disk little more than one of them does, and before any is renamed.

    Raises:
        OSError: a directory is not writable or the disk is full.
    """
    if _OPEN.get(None) is not None:
        yield
        return
    files: list[tuple[Path, Path]] = []
    token = _OPEN.set(files)
    try:
        yield
        _sync_all([temporary for temporary, _ in files])
        for temporary, path in files:
            temporary.replace(path)
        _sync_all({path.parent: None for _, path in files})
    finally:
        _OPEN.reset(token)
        for temporary, _ in files:
            temporary.unlink(missing_ok=True)


def _sync_all(paths: Collection[Path]) -> None:
    if len(paths) == 1:
        sync(*paths)
    elif paths:
        with ThreadPoolExecutor(len(paths)) as pool:
            list(pool.map(sync, paths))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` in one step."""

    def writer(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_file(path, writer)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys to ``path`` in one step."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to ``path`` in one step."""
    write_file(path, lambda temporary: safetensors.write_tensors(temporary, tensors, metadata))


def begin_directory(final: str | os.PathLike[str]) -> Path:
    """Make the temporary sibling in which ``final`` is to be filled, with a name that follows from its own.

    Raises:
        FileExistsError: ``final`` is already there.
    """
    final = Path(final)
    if final.exists():
        raise FileExistsError(f"{final} already exists; a complete checkpoint is never overwritten")
    temporary = temporary_of(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def temporary_of(final: str | os.PathLike[str]) -> Path:
    """Where :func:`begin_directory` lets ``final`` be filled, maybe by several processes."""
    return Path(final).parent / f"{_TEMPORARY}{Path(final).name}"


def finish_directory(final: str | os.PathLike[str], *, marker: bool = True) -> None:
    """Flush what ``final`` was filled with to the disk, and give it its name and its marker."""
    temporary = temporary_of(final)
    for directory, _, files in os.walk(temporary):
        for name in files:
            sync(Path(directory, name))
        sync(Path(directory))
    if marker:
        write_bytes(temporary / MARKER, b"")
    temporary.rename(final)
    sync(temporary.parent)


@contextlib.contextmanager
def complete_directory(final: str | os.PathLike[str], *, marker: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of ``final`` to fill; give it its name, with the marker, once the block succeeds.

    Without ``marker`` the directory holds nothing but what it was filled with; its name alone says it is whole.

    Raises:
        FileExistsError: ``final`` is already there.
    """
    temporary = begin_directory(final)
    try:
        yield temporary
        finish_directory(final, marker=marker)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_complete(directory: str | os.PathLike[str]) -> bool:
    """Whether ``directory`` was finished by :func:`complete_directory`."""
    return (Path(directory) / MARKER).is_file()


def remove_partial(parent: str | os.PathLike[str]) -> None:
    """Delete what interrupted writes left in ``parent``."""
    for entry in Path(parent).glob(f"{_TEMPORARY}*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
