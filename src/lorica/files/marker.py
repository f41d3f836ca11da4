"""The marker of a complete directory: a list of its files with their sizes and checksums.

The checksums find what disks, copies and file systems do to files. They are no signature: who can write the files can
write the marker.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

from lorica.errors import CheckpointError
from lorica.files.json import read_json_object

NAME = "COMPLETE"
_FILES = "files"
_CHUNK_BYTES = 1024 * 1024

Facts = tuple[int, int]
"""A file's size in bytes, and the CRC-32 of its content."""


def facts_of(path: Path) -> Facts:
    """Return size and checksum of a file."""
    size = checksum = 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(_CHUNK_BYTES):
            size, checksum = size + len(part), zlib.crc32(part, checksum)
    return size, checksum


def content(files: Mapping[str, Facts]) -> bytes:
    """Return what the marker of a directory with these files says."""
    return (json.dumps({_FILES: files}, sort_keys=True) + "\n").encode()


def is_there(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory was finished."""
    return Path(directory, NAME).is_file()


def check(directory: str | os.PathLike[str], *, but: Collection[str] = ()) -> None:
    """See that every file of a finished directory is as it was then. Other files may have been added.

    Args:
        directory: it has a marker.
        but: files that people may change.

    Raises:
        CheckpointError: one is missing or has changed; names it.
    """
    marker = Path(directory, NAME)
    if not marker.stat().st_size:  # as versions of lorica wrote it that kept no list
        return
    files = read_json_object(marker).get(_FILES)
    if not isinstance(files, dict):
        raise CheckpointError(f"{marker} is damaged: it lists no files")
    for name, facts in ((name, facts) for name, facts in files.items() if name not in but):
        path = Path(directory, name)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{marker} is damaged: {name!r} is no file of this directory")
        try:
            found = facts_of(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        if list(found) != facts:
            raise CheckpointError(f"{path} is damaged: {found[0]:,} bytes that are not those that were written")


__all__ = ["NAME", "Facts", "check", "content", "facts_of", "is_there"]
