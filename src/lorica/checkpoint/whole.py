"""From sharded state to one file, on one process: tensor by tensor, each held once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorica.checkpoint.names import WEIGHTS_NAME
from lorica.checkpoint.shards import Stored, opened, read_index, read_shard
from lorica.errors import CheckpointError
from lorica.files import atomic

FACTORS = "factors/"

# safetensors' names of dtypes, in the order in which its own writer lays them out.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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
    wanted = {name: stored for name, (_, stored) in index.items()}
    with ExitStack() as files:
        sources: dict[str, Any] = {}

        def tensors() -> Iterator[Tensor]:
            for name in _ordered(wanted):
                yield _assembled(state, *index[name], sources, files)
                each(name)

        atomic.write_file(output / WEIGHTS_NAME, lambda path: _write(path, wanted, tensors()))
    return output / WEIGHTS_NAME


def _ordered(tensors: Mapping[str, Stored]) -> list[str]:
    sizes = list(_DTYPES)
    return sorted(tensors, key=lambda name: (sizes.index(tensors[name].dtype), name))


def _assembled(state: Path, name: str, stored: Stored, sources: dict[str, Any], files: ExitStack) -> Tensor:
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    for shard in stored.shards:
        path = state / shard.file
        if shard.file not in sources:
            sources[shard.file] = files.enter_context(opened(path))
        place = tuple(slice(at, at + size) for at, size in zip(shard.offsets, shard.sizes, strict=True))
        whole[place] = read_shard(sources[shard.file], path, name, shard, stored)
    return whole


def _write(path: Path, tensors: Mapping[str, Stored], values: Iterator[Tensor]) -> None:
    """Write a safetensors file whose tensors come one by one, in the order of :func:`_ordered`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _ordered(tensors):
        shape, dtype, _ = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            _put(file, value)


def _put(file: BinaryIO, value: Tensor) -> None:
    file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
