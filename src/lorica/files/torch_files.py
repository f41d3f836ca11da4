"""Files of ``torch.save``, read without running them and without torch's own reader.

::

    archive/data.pkl          what was saved, a pickle that refers to storages by number
    archive/data/0, 1, …      the storages, not compressed
    archive/byteorder         "little"

``torch.load(weights_only=True)`` runs nothing either, but believes what a file says of sizes: it unpacks what is
compressed, makes a storage larger where a tensor claims more than there is (and shows what was in that memory before),
and lets a tensor of one number claim to be a trillion. Here every number of a tensor lies in the file.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Collection
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.errors import CheckpointError
from lorica.files.opening import open_regular
from lorica.files.pickles import OUTSIDE, Record, read_pickle

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
#: Dtypes without a storage of their own: the tensor names them.
_NAMED = {f"torch.{name}": getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2")}
_PARAMETER = "torch._utils._rebuild_parameter"
_REBUILD = {"torch._utils._rebuild_tensor_v2": False, "torch._utils._rebuild_tensor_v3": True}
_UNTYPED = "torch.storage.UntypedStorage"
_DICTIONARY = "collections.OrderedDict"
_KNOWN = frozenset({*_STORAGES, *_NAMED, *_REBUILD, _PARAMETER, _UNTYPED, _DICTIONARY, OUTSIDE})
_LOCAL_HEADER = struct.Struct("<26x2H")
_MAX_PICKLE = 16 * 1024 * 1024
_MAX_DIMENSIONS = 8
#: A storage may be that of a few tensors, as tied weights are.
_MAX_SHARING = 4


def read_torch_file(path: str | Path, *, also: Collection[str] = ()) -> Any:
    """Return what ``torch.save`` wrote into a file; its tensors are mapped, so that only what is used is read.

    Args:
        path: the file.
        also: names of objects that it may hold besides tensors; each is a :class:`Record`.

    Raises:
        CheckpointError: it is no such file, holds anything else than tensors and plain values, or says of a tensor
            what is not so.
    """
    with open_regular(path) as file:
        try:
            memory = torch.UntypedStorage.from_file(os.fspath(path), False, os.fstat(file.fileno()).st_size)
        except (OSError, RuntimeError) as error:  # it has no bytes, or fewer than a moment ago
            raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}") from error
        assert isinstance(memory, torch.UntypedStorage)
        return _read(_Archive(file, memory, str(path)), also)


def read_saved(data: bytearray, where: str) -> Any:
    """Return what ``torch.save`` wrote, from memory that its tensors then share; see :func:`read_torch_file`."""
    if not data:
        raise CheckpointError(f"{where}: it has no bytes")
    memory = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
    return _read(_Archive(io.BytesIO(data), memory, where), ())


def _read(archive: _Archive, also: Collection[str]) -> Any:
    known = _KNOWN | set(also)
    value = read_pickle(archive.pickle(), archive.where, known.__contains__)
    try:
        return _Builder(archive).build(value)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{archive.where}: not what torch saves: {str(error)[:300]}") from error


class _Archive:
    """The members of a zip archive that lie in it as they are.

    Args:
        file: the open file.
        memory: all of it.
        where: its name, for messages.

    Attributes:
        members: name, without the archive's → first byte and length.
    """

    def __init__(self, file: FileIO | io.BytesIO, memory: torch.UntypedStorage, where: str) -> None:
        self._file, self.memory, self.where = file, memory, where
        self.members: dict[str, tuple[int, int]] = {}
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    self._enter(member)
        except CheckpointError:
            raise
        except Exception as error:  # a reader of archives that is fed nonsense complains in any way
            raise CheckpointError(f"{where}: no archive of torch.save's: {str(error)[:200]}") from error
        if sum(length for _, length in self.members.values()) > memory.nbytes():
            raise CheckpointError(f"{where}: its members lie on one another")

    def _enter(self, member: zipfile.ZipInfo) -> None:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise CheckpointError(
                f"{self.where}: {member.filename[:100]} is compressed, and unpacks to {member.file_size} bytes"
            )
        self._file.seek(member.header_offset)
        name, extra = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        start = member.header_offset + _LOCAL_HEADER.size + name + extra
        if start + member.file_size > self.memory.nbytes():
            raise CheckpointError(f"{self.where}: {member.filename[:100]} ends too early")
        self.members[member.filename.partition("/")[2]] = (start, member.file_size)

    def bytes_of(self, name: str, most: int) -> bytes:
        """Return a small member.

        Raises:
            CheckpointError: it is missing, or not small.
        """
        start, length = self.members.get(name, (0, -1))
        if not 0 <= length <= most:
            raise CheckpointError(f"{self.where}: {name} is missing or too large")
        self._file.seek(start)
        return self._file.read(length)

    def pickle(self) -> bytes:
        """Return what was saved, as a pickle.

        Raises:
            CheckpointError: it is missing, or the numbers beside it are written in another way.
        """
        if "byteorder" in self.members and self.bytes_of("byteorder", 16) != b"little":
            raise CheckpointError(f"{self.where}: its numbers have their bytes in another order")
        return self.bytes_of("data.pkl", _MAX_PICKLE)


class _Builder:
    """Puts tensors in place of what a pickle says of them."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._left = _MAX_SHARING * archive.memory.nbytes()

    def build(self, value: Any) -> Any:
        if isinstance(value, Record):
            return self._object(value)
        if isinstance(value, dict):
            return {key: self.build(inner) for key, inner in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.build, value))
        return value

    def _object(self, record: Record) -> Any:
        if record.name in _REBUILD:
            return self._tensor(record)
        if record.name == _PARAMETER:
            return self.build(record.args[0])
        if record.name == _DICTIONARY:
            return {key: self.build(inner) for key, inner in record.items.items()}
        if record.name in _KNOWN:
            raise ValueError(f"it holds {record.name} by itself")
        return record

    def _tensor(self, record: Record) -> Tensor:
        storage, offset, size, stride, *more = record.args
        flat = self._storage(storage, _NAMED[more[2].name] if _REBUILD[record.name] else None)
        if not len(size) == len(stride) <= _MAX_DIMENSIONS or not all(
            type(number) is int and number >= 0 for number in (offset, *size, *stride)
        ):
            raise ValueError(f"no tensor is {size!r} in steps of {stride!r}")
        count = math.prod(size)
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if count > len(flat) or (count and last >= len(flat)):
            raise ValueError(f"a tensor of shape {size} in steps of {stride} is not inside of {len(flat)} numbers")
        self._left -= count * flat.itemsize
        if self._left < 0:
            raise ValueError("its tensors have more numbers than the file")
        return flat.as_strided(size, stride, offset) if count else flat.new_empty(size)

    def _storage(self, record: Record, dtype: torch.dtype | None) -> Tensor:
        kind, named, key, _, count = record.args[0]
        if record.name != OUTSIDE or kind != "storage" or type(key) is not str or type(count) is not int:
            raise ValueError("a tensor has no storage")
        if dtype is None:
            dtype = _STORAGES[named.name]
        elif named.name == _UNTYPED:
            count //= dtype.itemsize
        start, length = self._archive.members[f"data/{key}"]
        if count * dtype.itemsize != length:
            raise ValueError(f"storage {key} has {length} bytes, not {count} numbers of {dtype}")
        if not count:
            return torch.empty(0, dtype=dtype)
        part = self._archive.memory[start : start + length]  # a storage of its own, as torch's reader makes it
        if start % dtype.itemsize:
            part = part.clone()
        return torch.empty(0, dtype=dtype).set_(part, 0, (count,), (1,))


__all__ = ["read_saved", "read_torch_file"]
