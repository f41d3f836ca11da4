"""Several files of one directory that change together, though only one of them can be renamed at a time.

Weights under another configuration load without a complaint and are another adapter. So where a write replaces more
than one file, it first says in a journal which temporary file is to be which, then takes away all old files but the
first, and then renames. Whoever dies before the first is taken away leaves the old files; after that, one is missing,
:func:`resolve` finds the new files by the journal, and the next writer finishes. A reader that knows nothing of the
journal finds the old files, the new ones, or one missing; never some of both. Where none is missing a journal counts
for nothing: files that somebody else has put there are not replaced, and a stranger's journal shows no other adapter
than the one that everybody sees.
"""

from __future__ import annotations

import filecmp
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from lorica.errors import CheckpointError
from lorica.files.json import read_json_object

NAME = ".partial-journal.json"
_FILES = "files"
_MAX_BYTES = 64 * 1024
_TEMPORARY = re.compile(r"\.partial-[0-9a-f]{32}(\.\w+)?")


def resolve(directory: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file of a directory: also where its writer died before it could give it its name, which is
    a warning.

    Raises:
        CheckpointError: there is a journal, and it is none.
    """
    folder = Path(directory)
    files = read(folder)
    if name in files and is_unfinished(folder, files):
        path = folder / files[name]
        if path.is_file() and not path.is_symlink():
            warnings.warn(f"{folder}: saving was interrupted; {name} is read from {path.name}", stacklevel=2)
            return path
    return folder / name


def is_unfinished(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a file is missing that a journal names."""
    return not all((folder / name).exists() for name in files)


def read(folder: Path) -> dict[str, str]:
    """Return what an interrupted write announced in a folder: name → temporary name; empty where there was none.

    Raises:
        CheckpointError: there is a journal that names anything but files beside it.
    """
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        return {}
    files = read_json_object(path, limit=_MAX_BYTES).get(_FILES)
    if not isinstance(files, dict) or not all(map(_is_plain, files, files.values())):
        raise CheckpointError(f"{path}: {_FILES} does not name files beside it; delete it if you do not know it")
    return files


def _is_plain(name: object, temporary: object) -> bool:
    texts = isinstance(name, str) and isinstance(temporary, str)
    return texts and Path(str(name)).name == name and _TEMPORARY.fullmatch(str(temporary)) is not None


def content(files: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """Return what a journal says: the temporary file of each name, in the order in which they are to be renamed."""
    return {_FILES: files}


def is_needed(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a reader could find files of two versions if the writer died between renames.

    Args:
        folder: of both.
        files: name → temporary name.
    """
    if not any((folder / name).exists() for name in files):
        return False
    # The largest is compared last, and not at all where every other is as it was.
    ordered = sorted(files.items(), key=lambda item: (folder / item[1]).stat().st_size)
    changes = 0
    for left, (name, temporary) in zip(range(len(files), 0, -1), ordered, strict=True):
        if changes + left < 2:
            return False
        old = folder / name
        changes += not (old.is_file() and filecmp.cmp(old, folder / temporary, shallow=False))
    return changes > 1


def rename(folder: Path, files: Mapping[str, str]) -> None:
    """Do what a journal says, or the rest of it.

    Raises:
        OSError: a file cannot be renamed or removed.
    """
    waiting = [(name, temporary) for name, temporary in files.items() if (folder / temporary).is_file()]
    for name, _ in waiting[1:]:
        (folder / name).unlink(missing_ok=True)
    for name, temporary in waiting:
        (folder / temporary).replace(folder / name)


__all__ = ["NAME", "content", "is_needed", "is_unfinished", "read", "rename", "resolve"]
