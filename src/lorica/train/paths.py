"""Is it meant as a path or as a name on the hub? Asked before the network is."""

from __future__ import annotations

from pathlib import Path

from lorica.errors import suggest_path


def meant_as_path(name: str) -> bool:
    """Whether ``name``, which does not exist on the disk, must have been meant to.

    A hub name is ``owner/name`` or ``name``; what begins like a path, goes deeper, lies in a directory that exists,
    or looks much like a file that does, is a path with a mistake in it.
    """
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or len(path.parts) > 2:
        return True
    if len(path.parts) == 2:
        return path.parent.is_dir()
    return bool(path.suffix and suggest_path(path))
