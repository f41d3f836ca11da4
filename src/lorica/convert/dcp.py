"""Directories of ``torch.distributed.checkpoint``, which Megatron's "torch_dist" checkpoints are, without running them.

::

    .metadata          a pickle: key → shape, dtype and chunks; chunk → file, offset, length
    __0_0.distcp, …    chunks, each a tensor as ``torch.save`` writes it
    metadata.json      Megatron's word for the format
    common.pt          what is no tensor; not read

The pickle is read by a machine that can call nothing (:mod:`lorica.files.pickles`): torch's and Megatron's objects are
records, and any name that no checkpoint needs is an error. Chunks are read likewise (:mod:`lorica.files.torch_files`).
Where they lie and how large they are is checked against the files before they are read.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lorica.checkpoint.reading import check_finite
from lorica.convert.adapter import Lazy
from lorica.errors import CheckpointError
from lorica.files.opening import open_regular, read_fully, refuse_links_out
from lorica.files.pickles import Record, read_pickle
from lorica.files.torch_files import read_saved
from lorica.layout.tiling import tiles

METADATA = ".metadata"
_MAX_METADATA = 16 * 1024 * 1024
_MAX_DIMENSIONS = 8
#: What a chunk's file has besides its numbers (names, a directory, padding).
_MAX_OVERHEAD = 1024 * 1024
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
#: Modules whose objects are in metadata: of torch's checkpoints, and of what Megatron adds to them.
_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
_SIZE = "torch.Size"
_NAMES = frozenset(
    {
        *_DTYPES,
        *(_SIZE, "torch.serialization._get_layout", "collections.OrderedDict", "collections.defaultdict"),
        *(f"builtins.{name}" for name in ("getattr", "list", "dict", "tuple", "set")),
        *("pathlib.PosixPath", "pathlib._local.PosixPath"),
    }
)


def _is_known(name: str) -> bool:
    return name in _NAMES or name.startswith(_MODULES)


class Chunk(NamedTuple):
    """A rectangle of a tensor, and where it is.

    Attributes:
        offsets: its first element.
        sizes: its shape.
        file: name of the file.
        start: first byte.
        length: bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def within(self, lead: Sequence[int]) -> bool:
        """Whether it has elements whose first indices are these."""
        sides = zip(lead, self.offsets, self.sizes, strict=False)
        return all(start <= index < start + size for index, start, size in sides)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class Distributed:
    """A distributed checkpoint.

    Args:
        folder: its directory.

    Attributes:
        tensors: key → what is stored.

    Raises:
        CheckpointError: there is none, it names what no checkpoint needs, or it is broken.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / METADATA
        if not path.is_file():
            raise CheckpointError(f"{path}: no distributed checkpoint is here")
        refuse_links_out(path, self.folder)
        with open_regular(path) as file:
            data = read_fully(file, _MAX_METADATA + 1)
        if len(data) > _MAX_METADATA:
            raise CheckpointError(f"{path}: more than {_MAX_METADATA:,} bytes are too many")
        where = f"{path}: not the metadata of a distributed checkpoint"
        metadata = read_pickle(data, where, _is_known)
        try:
            self.tensors = dict(_stored(metadata))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{where}: {str(error)[:500]}") from error
        self._check_files()
        self._slices: dict[str, dict[int, list[Chunk]]] = {}

    def _check_files(self) -> None:
        """Refuse chunks that are not inside of their files, or lie on one another there.

        Afterwards there are no more numbers in all tensors than there are in the files.
        """
        files: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for key, stored in self.tensors.items():
            for chunk in stored.chunks:
                files[chunk.file].append((chunk.start, chunk.start + chunk.length, key))
        for name, places in files.items():
            path, end, before = self.folder / name, 0, ""
            if not path.is_file():
                raise CheckpointError(f"{path}: not readable: there is no such file, and {places[0][2]} is to be in it")
            refuse_links_out(path, self.folder)
            size = path.stat().st_size
            for start, stop, key in sorted(places):
                if start < end:
                    raise CheckpointError(f"{path}: chunks of {before} and {key} cannot be in one place")
                if stop > size:
                    raise CheckpointError(f"{path}: ends within {key}")
                end, before = stop, key

    def there(self, key: str, lead: Sequence[int] = ()) -> bool:
        """Whether there are elements of a tensor whose first indices are ``lead``."""
        return bool(self._within(key, lead))

    def _within(self, key: str, lead: Sequence[int]) -> list[Chunk]:
        """Return the chunks of a tensor that have elements whose first indices are ``lead``."""
        stored = self.tensors.get(key)
        if stored is None or not lead:
            return [] if stored is None else [*stored.chunks]
        if key not in self._slices:
            found = self._slices[key] = defaultdict(list)
            for chunk in stored.chunks:
                for index in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if chunk.offsets else ():
                    found[index].append(chunk)
        return [chunk for chunk in self._slices[key].get(lead[0], ()) if chunk.within(lead)]

    def lazy(self, key: str, lead: Sequence[int] = ()) -> Lazy:
        """Return the part of a tensor whose first indices are ``lead``, of the other dimensions only.

        Raises:
            CheckpointError: chunks are missing, or lie on one another.
        """
        stored = self.tensors[key]
        shape = stored.shape[len(lead) :]
        mine = self._within(key, lead)
        which = f"{key}{list(lead) if lead else ''}"
        counted = sum(math.prod(chunk.sizes[len(lead) :]) for chunk in mine)
        if counted != math.prod(shape):
            raise CheckpointError(f"{self.folder}: of {which} {counted} elements are stored, not {math.prod(shape)}")
        if not tiles(shape, ((chunk.offsets[len(lead) :], chunk.sizes[len(lead) :]) for chunk in mine)):
            raise CheckpointError(f"{self.folder}: of {which} some elements are stored twice, and others not at all")
        return Lazy(shape, stored.dtype, lambda: self._read(key, stored, tuple(lead), mine))

    def _read(self, key: str, stored: Stored, lead: tuple[int, ...], chunks: list[Chunk]) -> Tensor:
        result = torch.empty(stored.shape[len(lead) :], dtype=stored.dtype)
        for chunk in chunks:
            inside = tuple(index - start for index, start in zip(lead, chunk.offsets, strict=False))
            sides = zip(chunk.offsets[len(lead) :], chunk.sizes[len(lead) :], strict=True)
            result[tuple(slice(start, start + size) for start, size in sides)] = self._chunk(key, stored, chunk)[inside]
        check_finite({key: result}, str(self.folder))
        return result

    def _chunk(self, key: str, stored: Stored, chunk: Chunk) -> Tensor:
        path = self.folder / chunk.file
        with open_regular(path) as file:
            file.seek(chunk.start)
            data = read_fully(file, chunk.length)
        if len(data) < chunk.length:
            raise CheckpointError(f"{path}: ends within {key}")
        tensor = read_saved(bytearray(data), f"{path}: a chunk of {key} is not readable without running it")
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.sizes or tensor.dtype != stored.dtype:
            raise CheckpointError(f"{path}: a chunk of {key} is none of {chunk.sizes} {stored.dtype}")
        return tensor


def _stored(metadata: Any) -> Iterator[tuple[str, Stored]]:
    """Yield key and tensor; what is no tensor is left out."""
    if not isinstance(metadata, Record):
        raise CheckpointError(f"a {type(metadata).__name__}")
    places = {}
    for index, info in _items(metadata.fields["storage_data"]):
        places[index.fields["fqn"], _numbers(index.fields.get("offset") or ())] = info.fields
    for key, about in _items(metadata.fields["state_dict_metadata"]):
        if "chunks" not in about.fields:
            continue
        shape, properties = _numbers(about.fields["size"]), about.fields["properties"]
        named = properties.state[0] if isinstance(properties.state, tuple) else properties.fields["dtype"]
        dtype = _DTYPES.get(named.name)
        if type(key) is not str or dtype is None:
            raise CheckpointError(f"{key!r}: {named.name} {shape} is no tensor that can be read")
        chunks = []
        for chunk in about.fields["chunks"]:
            offsets, sizes = _numbers(chunk.fields["offsets"]), _numbers(chunk.fields["sizes"])
            info = places.get((key, offsets))
            if info is None or info.get("transform_descriptors"):
                raise CheckpointError(f"{key}: where the chunk at {offsets} lies is not said, or it is compressed")
            file, start, length = (info[name] for name in ("relative_path", "offset", "length"))
            if type(file) is not str or type(start) is not int or type(length) is not int:
                raise CheckpointError(f"{key}: {start!r} and {length!r} are no place in {file!r}")
            chunks.append(Chunk(offsets, sizes, file, start, length))
        yield key, _checked(key, Stored(shape, dtype, tuple(chunks)))


def _items(value: Mapping[Any, Any] | Record) -> Iterator[tuple[Any, Any]]:
    yield from (value.items if isinstance(value, Record) else value).items()


def _numbers(value: Any) -> tuple[int, ...]:
    if isinstance(value, Record) and value.name == _SIZE:
        value = value.args[0] if value.args else ()
    if not isinstance(value, (tuple, list)) or not all(type(one) is int and one >= 0 for one in value):
        raise ValueError(f"{value!r} is no shape")
    if len(value) > _MAX_DIMENSIONS:
        raise ValueError(f"{len(value)} dimensions are too many")
    return tuple(value)


def _checked(key: str, stored: Stored) -> Stored:
    for chunk in stored.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(stored.shape) and all(
            start + size <= length for start, size, length in zip(chunk.offsets, chunk.sizes, stored.shape, strict=True)
        )
        if not inside or min(chunk.start, chunk.length) < 0:
            raise CheckpointError(f"{key}: a chunk {chunk.sizes} at {chunk.offsets} is not inside of {stored.shape}")
        if chunk.file in ("", ".", "..") or Path(chunk.file).name != chunk.file or "\\" in chunk.file:
            raise CheckpointError(f"{key}: {chunk.file!r} is no name of a file beside the metadata")
        wanted = math.prod(chunk.sizes) * stored.dtype.itemsize
        if not wanted <= chunk.length <= wanted + _MAX_OVERHEAD:
            raise CheckpointError(f"{chunk.file}: {chunk.length} bytes of {key} cannot be {chunk.sizes} {stored.dtype}")
    return stored


# ---- writing ---------------------------------------------------------------------------------------------------------


class DistributedWriter:
    """Writes a distributed checkpoint chunk by chunk; no more than one chunk is in memory.

    Args:
        folder: a directory that is there.
    """

    _FILE = "__0_0.distcp"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._file = (self.folder / self._FILE).open("xb")  # closed by __exit__
        self._tensors: dict[str, tuple[tuple[int, ...], torch.dtype, list[Chunk]]] = {}

    def write(self, key: str, shape: Sequence[int], lead: Sequence[int], tensor: Tensor) -> None:
        """Write the part of a tensor of ``shape`` whose first indices are ``lead``."""
        chunk = tensor.detach().cpu().contiguous().clone().view((1,) * len(lead) + tuple(tensor.shape))
        _, _, chunks = self._tensors.setdefault(key, (tuple(shape), tensor.dtype, []))
        start = self._file.tell()
        torch.save(chunk, self._file)
        offsets = (*lead, *[0] * tensor.dim())
        chunks.append(Chunk(offsets, tuple(chunk.shape), self._FILE, start, self._file.tell() - start))

    def _finish(self) -> None:
        from torch.distributed.checkpoint import metadata as words
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        tensors: dict[str, Any] = {}
        places: dict[Any, Any] = {}
        for key, (shape, dtype, chunks) in self._tensors.items():
            parts = [words.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks]
            tensors[key] = words.TensorStorageMetadata(words.TensorProperties(dtype), torch.Size(shape), parts)
            for number, chunk in enumerate(chunks):
                index = words.MetadataIndex(key, chunk.offsets, number)
                places[index] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        said = words.Metadata(tensors, planner_data={key: (key,) for key in tensors}, storage_data=places)
        with (self.folder / METADATA).open("wb") as file:
            pickle.dump(said, file)
        torch.save({}, self.folder / "common.pt")
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps({**backends, **versions}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            self._finish()


__all__ = ["METADATA", "Chunk", "Distributed", "DistributedWriter", "Stored"]
