"""From sharded state to one file, on one process: tensor by tensor, each held once."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.checkpoint.names import WEIGHTS_NAME
from lorica.checkpoint.shards import Stored, find_shard, opened, read_index, read_shard
from lorica.errors import CheckpointError
from lorica.files import atomic
from lorica.files.tensors import DTYPES, ORDER, TensorWriter
from lorica.files.tensors import Stored as Placed

FACTORS = "factors/"

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def consolidate(state: Path, output: Path, *, each: Callable[[str], object] = lambda name: None) -> Path:
    """Write the adapter that a directory of shards holds as one file, the same that its ranks would have saved.

    Args:
        state: a directory with an index and shards.
        output: the directory for ``adapter_model.safetensors``; it is there.
        each: told each tensor's name once it is written.

    Returns:
        The file.

    Raises:
        CheckpointError: the shards are damaged or hold no adapter.
    """
    index = {
        name.removeprefix(FACTORS): (name, stored)
        for name, stored in read_index(state).items()
        if name.startswith(FACTORS)
    }
    if not index:
        raise CheckpointError(f"{state} holds no adapter")
    wanted = sorted(index, key=lambda name: (ORDER.index(_WORDS[index[name][1].dtype]), name))

    def write(path: Path) -> None:
        placed = {name: _placed(index[name][1]) for name in wanted}
        with ExitStack() as files, TensorWriter(path, placed, {"format": "pt"}) as writer:
            sources: dict[str, Any] = {}
            for name in wanted:
                writer.write(name, _assembled(state, *index[name], sources, files))
                each(name)

    atomic.write_file(output / WEIGHTS_NAME, write)
    return output / WEIGHTS_NAME


def _placed(stored: Stored) -> Placed:
    return Placed(_WORDS[stored.dtype], stored.shape, 0, math.prod(stored.shape) * stored.dtype.itemsize)


def _assembled(state: Path, name: str, stored: Stored, sources: dict[str, Any], files: ExitStack) -> Tensor:
    for shard in stored.shards:  # all that is said of sizes is true before anything of that size is made
        path = state / shard.file
        if shard.file not in sources:
            sources[shard.file] = files.enter_context(opened(path))
        find_shard(sources[shard.file], path, name, shard)
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    for shard in stored.shards:
        place = tuple(slice(at, at + size) for at, size in zip(shard.offsets, shard.sizes, strict=True))
        whole[place] = read_shard(sources[shard.file], state / shard.file, name, shard, stored)
    return whole
