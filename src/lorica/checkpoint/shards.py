"""torch's distributed checkpoint in safetensors and JSON: one file of shards for each rank, one index for all.

``shards-00003.safetensors`` has the rectangles that rank 3 wrote, ``index.json`` says of every logical tensor its
shape, its dtype, and which rectangle is where. Nothing in it knows the layout that wrote it, and nothing can run code.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lorica.errors import CheckpointError, shown
from lorica.files import atomic
from lorica.files.json import read_json_object
from lorica.files.opening import refuse_links_out
from lorica.files.tensors import OpenTensors, SlicedTensor, TensorReader
from lorica.layout.tiling import tiles

INDEX = "index.json"
_FORMAT = "lorica.shards.1"
_MAX_INDEX = 64 * 1024 * 1024
_MAX_DIMENSIONS, _MAX_LENGTH = 8, 2**48
_FILE = re.compile(r"shards-\d{5,}\.safetensors")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


class Shard(NamedTuple):
    """A rectangle of a logical tensor, and the file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str

    def key(self, name: str) -> str:
        """Its name in the file."""
        return key_of(name, self.offsets)


class Stored(NamedTuple):
    """One logical tensor in the index."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: tuple[Shard, ...]


def key_of(name: str, offsets: Sequence[int]) -> str:
    """The name of a shard in its file: the tensor's, and where the shard begins."""
    return f"{name}@{','.join(map(str, offsets))}"


def file_of(rank: int) -> str:
    """The file that a rank writes."""
    return f"shards-{rank:05d}.safetensors"


# ---- the index -------------------------------------------------------------------------------------------------------


def write_index(directory: Path, tensors: Mapping[str, Stored]) -> None:
    """Write the index of all shards in ``directory``."""
    listed = {
        name: {
            "shape": stored.shape,
            "dtype": str(stored.dtype).removeprefix("torch."),
            "shards": [[shard.offsets, shard.sizes, shard.file] for shard in stored.shards],
        }
        for name, stored in tensors.items()
    }
    content = json.dumps({"format": _FORMAT, "tensors": listed}, sort_keys=True)
    atomic.write_bytes(directory / INDEX, content.encode())


def read_index(directory: Path) -> dict[str, Stored]:
    """Read and check the index: every tensor is covered by its shards, once, and they are in this directory.

    Raises:
        CheckpointError: it is missing or damaged; says where.
    """
    path = directory / INDEX
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: this is no sharded state")
    values = read_json_object(path, limit=_MAX_INDEX)
    if values.get("format") != _FORMAT or not isinstance(values.get("tensors"), dict):
        raise CheckpointError(f"{path}: format {values.get('format')!r}, expected {_FORMAT!r}")
    return {name: _stored(value, f"{path}: {name}") for name, value in values["tensors"].items()}


def _stored(value: Any, where: str) -> Stored:
    try:
        shards = tuple(Shard(_lengths(at), _lengths(size), str(file)) for at, size, file in value["shards"])
        stored = Stored(_lengths(value["shape"]), _DTYPES[value["dtype"]], shards)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a tensor of an index: {error!r}") from None
    for shard in shards:
        inside = len(shard.offsets) == len(shard.sizes) == len(stored.shape) and all(
            at + size <= length for at, size, length in zip(shard.offsets, shard.sizes, stored.shape, strict=True)
        )
        if not inside or not _FILE.fullmatch(shard.file):
            raise CheckpointError(f"{where}: the shard {shard} is none of a tensor of shape {stored.shape}")
    held = sum(math.prod(shard.sizes) for shard in shards)
    if held != math.prod(stored.shape) or len({shard.offsets for shard in shards}) != len(shards):
        raise CheckpointError(f"{where}: the shards hold {held} of {math.prod(stored.shape)} elements")
    if len(shards) > 1 and not tiles(stored.shape, ((shard.offsets, shard.sizes) for shard in shards)):
        raise CheckpointError(f"{where}: shards lie on one another, so some elements are in none")
    return stored


def _lengths(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"{shown(values)} are no lengths of at most {_MAX_DIMENSIONS} dimensions")
    if not all(type(value) is int and 0 <= value < _MAX_LENGTH for value in values):
        raise ValueError(f"{shown(values)} are no lengths")
    return tuple(values)


# ---- torch's interfaces ----------------------------------------------------------------------------------------------


class ShardWriter(StorageWriter):
    """Writes a rank's shards into a directory that is there, and at the end the index.

    Args:
        directory: the same one for all ranks.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for rank, plan in enumerate(plans):
            object.__setattr__(plan, "storage_data", file_of(rank))
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        results = []
        for item in plan.items:
            found = planner.resolve_data(item)
            assert isinstance(found, Tensor)
            tensors[key_of(item.index.fqn, item.index.offset or ())] = found.cpu().contiguous()
            results.append(WriteResult(item.index, found.numel() * found.element_size(), plan.storage_data))
        if tensors:
            atomic.write_tensors(self._directory / plan.storage_data, tensors, {"format": "pt"})
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {result.index: str(result.storage_data) for written in results for result in written}
        write_index(self._directory, {name: _listed(name, known, files) for name, known in _tensors(metadata)})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _tensors(metadata: Metadata) -> list[tuple[str, TensorStorageMetadata]]:
    return [
        (name, known)
        for name, known in metadata.state_dict_metadata.items()
        if isinstance(known, TensorStorageMetadata)
    ]


def _listed(name: str, known: TensorStorageMetadata, files: Mapping[Any, str]) -> Stored:
    shards = (
        Shard(tuple(chunk.offsets), tuple(chunk.sizes), files[MetadataIndex(name, chunk.offsets)])
        for chunk in known.chunks
    )
    return Stored(tuple(known.size), known.properties.dtype, tuple(shards))


class ShardReader(StorageReader):
    """Reads what :class:`ShardWriter` wrote: of each file only the rectangles that are wanted.

    Raises:
        CheckpointError: the index is missing or damaged, or (while reading) a file is not what the index says.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.index = read_index(directory)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _metadata(stored) for name, stored in self.index.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[Any, Shard]]] = {}
        for item in plan.items:
            shard = self.index[item.storage_index.fqn].shards[item.storage_index.index or 0]
            by_file.setdefault(shard.file, []).append((item, shard))
        for file, wanted in by_file.items():
            with opened(self._directory / file) as source:
                for item, shard in wanted:
                    name = item.storage_index.fqn
                    window = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    target = planner.resolve_tensor(item)
                    target.copy_(read_shard(source, self._directory / file, name, shard, self.index[name], window))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _metadata(stored: Stored) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes)) for shard in stored.shards]
    return TensorStorageMetadata(TensorProperties(dtype=stored.dtype), torch.Size(stored.shape), chunks)


def opened(path: Path) -> AbstractContextManager[OpenTensors]:
    """Open a file of shards.

    Raises:
        CheckpointError: it is missing or damaged, or lies elsewhere.
    """
    refuse_links_out(path)
    return TensorReader(path).opened()


def find_shard(source: OpenTensors, path: Path, name: str, shard: Shard) -> SlicedTensor:
    """Return a shard that can be indexed by slices, and is not read yet.

    Raises:
        CheckpointError: the file lacks it, or has it in another shape than the index says.
    """
    key = shard.key(name)
    if key not in source.reader.tensors:
        raise CheckpointError(f"{path}: it lacks {key}, which the index says it has")
    part = source.slices(key)
    if part.shape != shard.sizes:
        raise CheckpointError(f"{path}: {key} has shape {part.shape}, the index says {shard.sizes}")
    return part


def read_shard(
    source: OpenTensors, path: Path, name: str, shard: Shard, stored: Stored, window: tuple[slice, ...] | None = None
) -> Tensor:
    """Return a shard, or the ``window`` of it.

    Raises:
        CheckpointError: the file holds something else than the index says.
    """
    part = find_shard(source, path, name, shard)
    value = part[window or ...]
    if value.dtype != stored.dtype:
        raise CheckpointError(f"{path}: {shard.key(name)} is {value.dtype}, the index says {stored.dtype}")
    return value
