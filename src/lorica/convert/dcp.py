"""Directories of ``torch.distributed.checkpoint``, which Megatron's "torch_dist" checkpoints are, without running them.

::

    .metadata          a pickle: key → shape, dtype and chunks; chunk → file, offset, length
    __0_0.distcp, …    chunks, each a tensor as ``torch.save`` writes it
    metadata.json      Megatron's word for the format
    common.pt          what is no tensor; not read

The pickle is read by an unpickler that makes inert records of whatever torch's and Megatron's checkpointing wrote: none
of their classes is looked up, nothing is imported, nothing of theirs is called, and any other name is an error. Chunks
are read with ``weights_only``. Where they lie and how large they are is checked against the file before they are read.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lorica.convert.adapter import Lazy
from lorica.errors import CheckpointError

METADATA = ".metadata"
_MAX_METADATA = 1024 * 1024 * 1024
#: What a chunk's file has besides its numbers (names, a directory, padding).
_MAX_OVERHEAD = 1024 * 1024
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}


class _Inert:
    """A record of whatever the pickle says of an object: arguments and attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _member(owner: Any, name: str) -> _Inert:
    """Record a member of an enumeration; some versions of Python store it as an attribute that is to be taken."""
    return _Inert(owner, name)


def _numbers(values: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(map(int, values))


#: Modules whose objects become records: of torch's checkpoints, and of what Megatron adds to them.
_RECORDED = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
#: What is built in place of other names.
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): _numbers,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "getattr"): _member,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
    ("builtins", "set"): set,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(map(str, parts)),
    ("pathlib._local", "PosixPath"): lambda *parts: "/".join(map(str, parts)),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Makes inert records; any name that no checkpoint needs is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if f"{module}.".startswith(_RECORDED):
            return type(name.rpartition(".")[2], (_Inert,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to something outside ({pid!r})")


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
        try:
            if path.stat().st_size > _MAX_METADATA:
                raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes are too many")
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            self.tensors = dict(_stored(metadata))
        except OSError as error:
            raise CheckpointError(f"{path}: no distributed checkpoint is here ({error.strerror})") from error
        except CheckpointError:
            raise
        except Exception as error:  # an unpickler that is fed nonsense complains in any way
            raise CheckpointError(f"{path}: not the metadata of a distributed checkpoint: {error}") from error

    def there(self, key: str, lead: Sequence[int] = ()) -> bool:
        """Whether there are elements of a tensor whose first indices are ``lead``."""
        stored = self.tensors.get(key)
        return stored is not None and any(chunk.within(lead) for chunk in stored.chunks)

    def lazy(self, key: str, lead: Sequence[int] = ()) -> Lazy:
        """Return the part of a tensor whose first indices are ``lead``, of the other dimensions only.

        Raises:
            CheckpointError: chunks are missing, or lie on one another.
        """
        stored = self.tensors[key]
        shape = stored.shape[len(lead) :]
        mine = [chunk for chunk in stored.chunks if chunk.within(lead)]
        counted = sum(math.prod(chunk.sizes[len(lead) :]) for chunk in mine)
        if counted != math.prod(shape):
            which = f"{key}{list(lead) if lead else ''}"
            raise CheckpointError(f"{self.folder}: of {which} {counted} elements are stored, not {math.prod(shape)}")
        return Lazy(shape, stored.dtype, lambda: self._read(key, stored, tuple(lead), mine))

    def _read(self, key: str, stored: Stored, lead: tuple[int, ...], chunks: list[Chunk]) -> Tensor:
        result = torch.empty(stored.shape[len(lead) :], dtype=stored.dtype)
        for chunk in chunks:
            inside = tuple(index - start for index, start in zip(lead, chunk.offsets, strict=False))
            sides = zip(chunk.offsets[len(lead) :], chunk.sizes[len(lead) :], strict=True)
            result[tuple(slice(start, start + size) for start, size in sides)] = self._chunk(key, stored, chunk)[inside]
        return result

    def _chunk(self, key: str, stored: Stored, chunk: Chunk) -> Tensor:
        path = self.folder / chunk.file
        wanted = math.prod(chunk.sizes) * stored.dtype.itemsize
        if not wanted <= chunk.length <= wanted + _MAX_OVERHEAD:
            raise CheckpointError(f"{path}: {chunk.length} bytes of {key} cannot be {chunk.sizes} of {stored.dtype}")
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                data = file.read(chunk.length)
            if len(data) < chunk.length:
                raise CheckpointError(f"{path}: ends within {key}")
            _check_archive(data, wanted)
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: a chunk of {key} is not readable without running it: {error}") from error
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.sizes or tensor.dtype != stored.dtype:
            raise CheckpointError(f"{path}: a chunk of {key} is none of {chunk.sizes} {stored.dtype}")
        return tensor


def _check_archive(data: bytes, wanted: int) -> None:
    """Refuse a chunk that would unpack to more than it should have."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        whole = sum(member.file_size for member in archive.infolist())
    if whole > wanted + _MAX_OVERHEAD:
        raise ValueError(f"it unpacks to {whole} bytes in place of {wanted}")


def _stored(metadata: Any) -> Iterator[tuple[str, Stored]]:
    """Yield key and tensor; what is no tensor is left out."""
    places = {
        (index.fqn, _numbers(getattr(index, "offset", None) or ())): info
        for index, info in metadata.storage_data.items()
    }
    for key, about in metadata.state_dict_metadata.items():
        if not hasattr(about, "chunks"):
            continue
        shape, properties = _numbers(about.size), about.properties
        dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype) or min(shape, default=1) < 0:
            raise CheckpointError(f"{key!r}: {dtype} {shape} is no tensor that can be read")
        chunks = []
        for chunk in about.chunks:
            offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
            info = places.get((key, offsets))
            if info is None or getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{key}: where the chunk at {offsets} lies is not said, or it is compressed")
            chunks.append(Chunk(offsets, sizes, str(info.relative_path), int(info.offset), int(info.length)))
        yield key, _checked(key, Stored(shape, dtype, tuple(chunks)))


def _checked(key: str, stored: Stored) -> Stored:
    for chunk in stored.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(stored.shape) and all(
            min(start, size) >= 0 and start + size <= length
            for start, size, length in zip(chunk.offsets, chunk.sizes, stored.shape, strict=True)
        )
        if not inside or min(chunk.start, chunk.length) < 0:
            raise CheckpointError(f"{key}: a chunk {chunk.sizes} at {chunk.offsets} is not inside of {stored.shape}")
        if chunk.file in ("", ".", "..") or Path(chunk.file).name != chunk.file or "\\" in chunk.file:
            raise CheckpointError(f"{key}: {chunk.file!r} is no name of a file beside the metadata")
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
