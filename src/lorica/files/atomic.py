"""Writing so that a crash at any moment leaves either the old file or the new one, never a half.

A file is written under a temporary name in the same directory, flushed to the disk, and renamed over the old one
(``rename`` is atomic on POSIX file systems); several that belong together are renamed by a journal. A directory of
several files is complete only once its marker is there: it is filled under a temporary name, the marker is written
last, and then the directory gets its final name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lorica.errors import CheckpointError
from lorica.files import journal, marker
from lorica.files import tensors as safetensors
from lorica.files.locks import wait_for_lock

MARKER = marker.NAME
_TEMPORARY = ".partial-"
_THREADS = 16
_PATIENCE = 30.0  # seconds for another process that renames files, which takes none
_LONGEST = 100  # of a name to which an owner's is added; file systems take 255
_T = TypeVar("_T")


def sync(path: Path) -> None:
    """Flush a file's or directory's data to the disk."""
    with naming_path(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming_path(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the system that names no file name this one: writes and flushes know only descriptors."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


# ---- files -----------------------------------------------------------------------------------------------------------


def write_file(path: str | os.PathLike[str], writer: Callable[[Path], None]) -> None:
    """Let ``writer`` fill a temporary file, then put it in place of ``path`` in one step.

    Raises:
        OSError: the directory is not writable or the disk is full; ``path`` is then as it was.
    """
    with at_once():
        path = Path(path)
        temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}{path.suffix}"
        _OPEN.get().append((temporary, path))
        with naming_path(temporary):
            writer(temporary)


#: Temporary files that are to be flushed and renamed at the end of the outermost :func:`at_once`, and their names then.
_OPEN: ContextVar[list[tuple[Path, Path]]] = ContextVar("open")


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Put all files that are written inside the block in their places at its end, in the order they were written in;
    if it or a flush fails, none.

    All are flushed at the same time, which costs the disk little more than one of them does, and before any is renamed.
    Files of one directory that replace others are renamed by a journal: see :mod:`lorica.files.journal`.

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
        _at_the_same_time(sync, [temporary for temporary, _ in files])
        with _alone_in({path.parent for _, path in files}):
            _put(files)
    finally:
        _OPEN.reset(token)
        for temporary, path in files:
            if os.path.lexists(temporary):
                with contextlib.suppress(OSError, CheckpointError):
                    if journal.read(path.parent).get(path.name) != temporary.name:
                        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone_in(folders: Collection[Path]) -> Iterator[None]:
    """Let no other process rename files in these folders meanwhile: ranks that nobody told apart save all at once.

    Some shared file systems have no locks of directories; it goes without there.

    Raises:
        TimeoutError: another one does not come to an end.
    """
    with contextlib.ExitStack() as held:
        for folder in sorted(folders):
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            if not wait_for_lock(descriptor, _PATIENCE):
                said = f"another process has been renaming files here for {_PATIENCE:g} s"
                raise TimeoutError(errno.ETIMEDOUT, said, os.fspath(folder))
        yield


def _put(files: list[tuple[Path, Path]]) -> None:
    folders: dict[Path, dict[str, str]] = {}
    for temporary, path in files:
        folders.setdefault(path.parent, {})[path.name] = temporary.name
    announced: list[Path] = []
    try:
        for folder, names in folders.items():
            finish_files(folder)
            if journal.is_needed(folder, names):
                announced.append(folder)
                _announce(folder, names)
    except BaseException:
        for folder in announced:
            (folder / journal.NAME).unlink(missing_ok=True)
        raise
    for folder, names in folders.items():
        if folder in announced:
            _carry_out(folder, names)
            continue
        for name, filled in names.items():
            (folder / filled).replace(folder / name)
    _at_the_same_time(sync, folders)


def _announce(folder: Path, names: Mapping[str, str]) -> None:
    temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}.json"
    try:
        with naming_path(temporary):
            temporary.write_text(json.dumps(journal.content(names)), encoding="utf-8")
        sync(temporary)
        temporary.replace(folder / journal.NAME)
        sync(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _carry_out(folder: Path, names: Mapping[str, str]) -> None:
    def rename() -> None:
        journal.rename(folder, names)
        sync(folder)
        (folder / journal.NAME).unlink(missing_ok=True)

    try:
        rename()
    except BaseException:  # also an interruption: what is announced is done, as far as it can be
        with contextlib.suppress(OSError):
            rename()
        raise


def finish_files(folder: Path) -> None:
    """Do what a writer of several files had begun to do and died, or forget it if it had not begun.

    Raises:
        OSError: a file cannot be renamed.
        CheckpointError: what should be a journal is none.
    """
    names = journal.read(folder)
    if names and journal.is_unfinished(folder, names):
        _carry_out(folder, names)
    for name in [*names.values(), journal.NAME] if names else []:
        (folder / name).unlink(missing_ok=True)


def _at_the_same_time(work: Callable[[Path], _T], paths: Collection[Path]) -> list[_T]:
    if len(paths) < 2:
        return [work(path) for path in paths]
    with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
        return list(pool.map(work, paths))


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


# ---- directories -----------------------------------------------------------------------------------------------------


def begin_directory(final: str | os.PathLike[str]) -> Path:
    """Make the temporary sibling in which ``final`` is to be filled, with a name that follows from its own.

    Nobody else may be doing the same: what an earlier attempt left is removed.

    Raises:
        FileExistsError: ``final`` is already there.
    """
    _refuse_existing(Path(final))
    temporary = temporary_of(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def temporary_of(final: str | os.PathLike[str]) -> Path:
    """Where :func:`begin_directory` lets ``final`` be filled, maybe by several processes."""
    return Path(final).parent / f"{_TEMPORARY}{Path(final).name}"


def finish_directory(final: str | os.PathLike[str]) -> None:
    """Flush what ``final`` was filled with to the disk, and give it its marker and its name."""
    _finish(temporary_of(final), Path(final), with_marker=True)


def _finish(temporary: Path, final: Path, *, with_marker: bool) -> None:
    found = [(Path(directory), names) for directory, _, names in os.walk(temporary)]
    files = [directory / name for directory, names in found for name in names]
    _at_the_same_time(sync, files)
    _at_the_same_time(sync, [directory for directory, _ in found])
    if with_marker:
        facts = _at_the_same_time(marker.facts_of, files)
        names = [path.relative_to(temporary).as_posix() for path in files]
        write_bytes(temporary / MARKER, marker.content(dict(zip(names, facts, strict=True))))
    _refuse_existing(final)
    temporary.rename(final)
    sync(final.parent)


@contextlib.contextmanager
def complete_directory(final: str | os.PathLike[str], *, marker: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of ``final`` to fill; give it its name, with the marker, once the block succeeds.

    Without ``marker`` the directory holds nothing but what it was filled with; its name alone says it is whole.
    Of two processes that make the same directory the second one to finish is refused.

    Raises:
        FileExistsError: ``final`` is already there.
    """
    final = Path(final)
    _refuse_existing(final)
    _remove_abandoned(final)
    owner = f"{os.getpid()}@{socket.gethostname()}"
    temporary = final.parent / f"{_TEMPORARY}{final.name[:_LONGEST]}.{uuid.uuid4().hex[:8]}.{owner}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _finish(temporary, final, with_marker=marker)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(final: Path) -> None:
    if final.exists():
        raise FileExistsError(f"{final} already exists; a complete directory is never overwritten")


def _remove_abandoned(final: Path) -> None:
    """Remove what processes of this machine that are gone left of the same directory."""
    named = rf"{re.escape(_TEMPORARY + final.name[:_LONGEST])}\.[0-9a-f]{{8}}\.(\d+)@{re.escape(socket.gethostname())}"
    for entry in final.parent.glob(f"{_TEMPORARY}*@*"):
        match = re.fullmatch(named, entry.name)
        if match and not _is_alive(int(match.group(1))):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def is_complete(directory: str | os.PathLike[str]) -> bool:
    """Whether ``directory`` was finished by :func:`complete_directory`."""
    return marker.is_there(directory)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Delete a directory, if it is there; from the first moment on nothing of it is found under its name.

    Raises:
        OSError: it cannot be moved away.
    """
    if Path(path).is_dir() and not Path(path).is_symlink():
        doomed = Path(path).parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        Path(path).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_partial(parent: str | os.PathLike[str]) -> None:
    """Delete what interrupted writes left in ``parent``; those that were announced are finished."""
    finish_files(Path(parent))
    for entry in Path(parent).glob(f"{_TEMPORARY}*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
