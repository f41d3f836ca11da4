"""Reading JSON that comes from strangers: bounded in size and depth, no duplicate keys, objects only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorica.errors import CheckpointError

MAX_BYTES = 8 * 1024 * 1024


def read_json_object(path: str | Path, *, limit: int | None = None) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        CheckpointError: the file is larger than ``limit`` (8 MiB), is not JSON, is nested too deeply, repeats a key, or
            holds something else than an object.
    """
    path = Path(path)
    size = path.stat().st_size
    limit = MAX_BYTES if limit is None else limit
    if size > limit:
        raise CheckpointError(f"{path}: {size:,} bytes is too large for a configuration (limit {limit:,})")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply to be a configuration") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(path: Path) -> Any:
    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the key {twice!r} stands twice")
        return result

    return collect
