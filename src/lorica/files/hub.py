"""Finding files in a directory or on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.errors import CheckpointError
from lorica.files import journal
from lorica.files.opening import refuse_links_out


def find_file(source: str | os.PathLike[str], name: str, *, subfolder: str | None = None, **hub: Any) -> Path:
    """Return the path of ``name`` in the directory ``source``, or in the hub's repository of that id.

    Args:
        source: a directory, or a repository id such as ``"user/adapter"``.
        name: the file's name.
        subfolder: folder of ``source`` to look in, inside of it.
        hub: arguments of ``huggingface_hub.hf_hub_download`` (``revision``, ``token``, ``cache_dir`` …).

    Raises:
        CheckpointError: neither the directory nor the hub has the file, or it lies elsewhere: a link leads out of the
            directory, or the subfolder does.
    """
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise CheckpointError(f"subfolder={os.fspath(subfolder)!r} is not inside of {source}")
    directory = Path(source, subfolder or "")
    path = journal.resolve(directory, name)
    if path.is_file():
        refuse_links_out(path, source)
        return path
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: not a regular file, or a link that leads nowhere")
    if Path(source).exists() or not _is_repository_id(os.fspath(source)):
        raise CheckpointError(f"Can't find '{name}' at '{directory}'")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(os.fspath(source), name, subfolder=subfolder, **hub))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise CheckpointError(f"Can't find '{name}' at '{source}': {error}") from error


def find_folder(source: str, patterns: Sequence[str], **hub: Any) -> Path:
    """Return a local directory with the files of the hub's repository ``source`` that match.

    Args:
        source: a repository id.
        patterns: such as ``"*.json"``.
        hub: arguments of ``huggingface_hub.snapshot_download`` (``revision``, ``token``, ``cache_dir`` …).

    Raises:
        CheckpointError: the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns), **hub))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise CheckpointError(f"Can't get the files of {source!r}: {error}") from error


def _is_repository_id(source: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True
