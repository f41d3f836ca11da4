"""What one system's files cannot say of an adapter, in a file beside them, so that going back gives what there was.

``conversion.json`` holds the configuration that the adapter came with and, of every pair that was made of several or
padded, how (:func:`lorica.convert.fuse.apart` undoes it). It only ever restores what the tensors bear out: an adapter
that was trained further in its fused form has numbers where there were zeros, and is then read as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.config.lora import check_fields
from lorica.errors import CheckpointError
from lorica.files.atomic import write_json
from lorica.files.json import read_json_object

NAME = "conversion.json"
_FORMAT = "lorica conversion"
_VERSION = 1
_MAX_BYTES = 16 * 1024 * 1024
_KINDS: dict[str, type] = {
    **dict.fromkeys(("config", "bridge", "neuron", "model", "spelling"), dict),
    "joined": list,
}


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a conversion wrote beside an adapter; empty where there is none.

    Raises:
        CheckpointError: the file is no record.
        ConfigError: a field of the configuration in it has an impossible value.
    """
    path = Path(folder, NAME)
    if not path.is_file():
        return {}
    values = read_json_object(path, limit=_MAX_BYTES)
    if values.pop("format", None) != _FORMAT or values.pop("version", None) != _VERSION:
        raise CheckpointError(
            f"{path}: not a {_FORMAT!r} of version {_VERSION}; delete it to read the adapter as it is"
        )
    for key, value in values.items():
        if not isinstance(value, _KINDS.get(key, object)):
            raise CheckpointError(f"{path}: {key!r} is no {_KINDS[key].__name__}")
    check_fields(values.get("config", {}), f"{path}: config")
    return values


def write_record(folder: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write a record, if there is anything to say."""
    if said := {key: value for key, value in values.items() if value}:
        write_json(Path(folder, NAME), {"format": _FORMAT, "version": _VERSION, **said})


__all__ = ["NAME", "read_record", "write_record"]
