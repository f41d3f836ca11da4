"""Safetensors files tensor by tensor: what is read or written is never more than one tensor in memory.

``safetensors`` maps a file as a whole and writes a file as a whole. A mapped file that somebody truncates ends the
process, and one that is written over changes what was checked already; so files are opened and read here. Headers are
read and checked by :mod:`lorica.files.header`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lorica.errors import CheckpointError
from lorica.files.header import DTYPES, WORDS, Stored, read_header
from lorica.files.opening import open_regular

#: The order in which safetensors' own writer lays tensors out: the most demanding in alignment first.
ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_RANK = {word: rank for rank, word in enumerate(ORDER)}
_ALIGNMENT = 8
_COPY_BYTES = 4 * 1024 * 1024
#: A tensor of which columns are read is kept, if it is no larger: stacks of factors are read column by column.
_KEPT_BYTES = 256 * 1024 * 1024
_BUFFER_BYTES = 1024 * 1024
# NumPy knows these: they are written as they are, without a view as bytes.
_OF_NUMPY = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8}


class TensorReader:
    """Reads single tensors of a safetensors file. The file is not mapped, so nothing of it stays in memory.

    Args:
        path: the file.

    Attributes:
        tensors: name → where it lies, in the file's order.
        metadata: the file's own words about itself.

    Raises:
        CheckpointError: it is not a whole safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(self.path) as file:
            self.tensors, self.metadata = read_header(file, self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def dtype_of(self, name: str) -> torch.dtype:
        """Return a tensor's dtype.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        word = self.tensors[name].word
        if word not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is stored as {word}, which cannot be computed with")
        return DTYPES[word]

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Open the file, to read many tensors."""
        with open_regular(self.path) as file:
            yield OpenTensors(self, file)

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own.

        Raises:
            CheckpointError: torch has no such dtype, or the file became shorter.
        """
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=self.dtype_of(name))
        with self.opened() as file:
            file.read_into(tensor, stored.start)
        return tensor


class OpenTensors(NamedTuple):
    """A file of tensors that is open."""

    reader: TensorReader
    file: FileIO

    def read_into(self, tensor: Tensor, place: int) -> None:
        """Fill a contiguous tensor on the CPU with what begins at ``place``.

        Raises:
            CheckpointError: the file became shorter.
        """
        self.file.seek(place)
        rest = _bytes_of(tensor)
        while len(rest) and (count := self.file.readinto(rest)):
            rest = rest[count:]
        if len(rest):
            raise CheckpointError(f"{self.reader.path}: the tensors end too early")

    def slices(self, name: str) -> SlicedTensor:
        """Return a tensor of which rectangles can be read.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        return SlicedTensor(self, self.reader.tensors[name], self.reader.dtype_of(name))


class SlicedTensor:
    """A tensor in an open file, which is indexed by slices as a tensor is; only then something is read.

    Whole rows are read as they lie. Of others the tensor is read once and kept, as long as this object is, or where
    it is large, a few rows at a time.

    Args:
        file: the open file.
        stored: where the tensor is.
        dtype: its dtype.
    """

    def __init__(self, file: OpenTensors, stored: Stored, dtype: torch.dtype) -> None:
        self._file, self._stored, self.dtype = file, stored, dtype
        self._kept: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._stored.shape

    def __getitem__(self, index: Any) -> Tensor:
        """Return a rectangle, in memory of its own.

        Args:
            index: a slice, or a tuple of them, or an ellipsis for everything.

        Raises:
            CheckpointError: the file became shorter.
        """
        given = () if index is ... else index if isinstance(index, tuple) else (index,)
        sides = [range(*side.indices(size)) for side, size in zip(given, self.shape, strict=False)]
        sides += [range(size) for size in self.shape[len(given) :]]
        if not sides or all(len(side) == size for side, size in zip(sides[1:], self.shape[1:], strict=True)):
            return self._rows(sides[0] if sides else range(1))
        rows, inside = sides[0], (slice(None), *(slice(side.start, side.stop) for side in sides[1:]))
        if self._stored.stop - self._stored.start <= _KEPT_BYTES:
            if self._kept is None:
                self._kept = self._rows(range(self.shape[0]))
            return self._kept[rows.start : rows.stop][inside].clone()
        result = torch.empty([len(side) for side in sides], dtype=self.dtype)
        step = max(1, _COPY_BYTES * self.shape[0] // (self._stored.stop - self._stored.start))
        for start in range(0, len(rows), step):
            part = self._rows(rows[start : start + step])
            result[start : start + step] = part[inside]
        return result

    def _rows(self, rows: range) -> Tensor:
        result = torch.empty((len(rows), *self.shape[1:]) if self.shape else (), dtype=self.dtype)
        if result.numel():
            self._file.read_into(result, self._stored.start + rows.start * (result.nbytes // len(rows)))
        return result


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in an order that is known from the start.

    Args:
        path: the file; it must not be there.
        tensors: name → what it will be; only word and shape count.
        metadata: words about the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], tensors: Mapping[str, Stored], metadata: Mapping[str, str]
    ) -> None:
        self._waiting = list(tensors.items())[::-1]
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        place = 0
        for name, stored in tensors.items():
            stop = place + stored.stop - stored.start
            header[name] = {"dtype": stored.word, "shape": stored.shape, "data_offsets": [place, stop]}
            place = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = Path(path).open("xb", buffering=_BUFFER_BYTES)  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        stored = self._next(name)
        assert (stored.word, stored.shape) == (WORDS[tensor.dtype], tensor.shape)
        tensor = tensor.contiguous()
        self._file.write(tensor.numpy() if tensor.dtype in _OF_NUMPY else _bytes_of(tensor))  # type: ignore[arg-type]

    def copy(self, name: str, source: TensorReader, as_stored: str) -> None:
        """Write the next tensor as another one is in another file."""
        stored = self._next(name)
        with open_regular(source.path) as file:
            file.seek(source.tensors[as_stored].start)
            left = stored.stop - stored.start
            while left:
                part = file.read(min(left, _COPY_BYTES))
                if not part:
                    raise CheckpointError(f"{source.path}: {name} ends too early")
                self._file.write(part)
                left -= len(part)

    def _next(self, name: str) -> Stored:
        expected, stored = self._waiting.pop()
        assert expected == name
        return stored

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert error is not None or not self._waiting


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, byte for byte the one that safetensors' own writer makes of these tensors.

    They may lie on any device, have gaps, and share memory, which the format does not know: each is written by itself.
    No more than one copy is in memory at a time.

    Raises:
        CheckpointError: the format has no word for a dtype.
        FileExistsError: the file is there.
    """
    placed: list[tuple[int, str, Stored]] = []
    for name, tensor in tensors.items():
        if (word := WORDS.get(tensor.dtype)) is None:
            raise CheckpointError(f"{path}: {name} has the dtype {tensor.dtype}, which is not written")
        placed.append((_RANK[word], name, Stored(word, tuple(tensor.shape), 0, tensor.nbytes)))
    placed.sort()
    with TensorWriter(path, {name: stored for _, name, stored in placed}, metadata) as writer:
        for _, name, _ in placed:
            tensor = tensors[name]
            writer.write(name, (tensor.detach() if tensor.requires_grad else tensor).cpu())


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


__all__ = ["DTYPES", "ORDER", "OpenTensors", "SlicedTensor", "Stored", "TensorReader", "TensorWriter", "write_tensors"]
