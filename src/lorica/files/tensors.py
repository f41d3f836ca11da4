"""Safetensors files tensor by tensor: what is read or written is never more than one tensor in memory.

``safetensors`` maps a file as a whole and writes a file as a whole. Its format is simple: eight bytes with the length
of a JSON header, the header, then the tensors one after the other (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import Self

from lorica.errors import CheckpointError

#: The format's word for each dtype that tensors are computed with here; others are only copied.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {dtype: word for word, dtype in DTYPES.items()} | {
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
#: The order in which safetensors' own writer lays tensors out: the most demanding in alignment first.
ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_RANK = {word: rank for rank, word in enumerate(ORDER)}
_ALIGNMENT = 8
_COPY_BYTES = 4 * 1024 * 1024
_BUFFER_BYTES = 1024 * 1024
# NumPy knows these: they are written as they are, without a view as bytes.
_OF_NUMPY = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8}


class Stored(NamedTuple):
    """A tensor in a file: the format's word for its dtype, its shape, and its bytes in the file."""

    word: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype, if it is one that torch computes with."""
        return DTYPES.get(self.word)

    def of(self, dtype: torch.dtype) -> Stored:
        """Return what the tensor would be in another dtype; its place is not known then."""
        return Stored(_WORDS[dtype], self.shape, 0, math.prod(self.shape) * dtype.itemsize)


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
        try:
            with safe_open(self.path, framework="pt"):  # checks sizes, offsets, dtypes and names
                pass
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                size = os.fstat(file.fileno()).st_size
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: not a readable safetensors file: {error}") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        first = 8 + length
        found = {}
        for name, value in header.items():
            start, stop = value["data_offsets"]
            found[name] = Stored(value["dtype"], tuple(value["shape"]), first + start, first + stop)
        self.tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
        if size != max((stored.stop for stored in found.values()), default=first):
            raise CheckpointError(f"{self.path} was changed while it was read")

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
        with self.path.open("rb", buffering=0) as file:
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
        assert (stored.word, stored.shape) == (_WORDS[tensor.dtype], tensor.shape)
        tensor = tensor.contiguous()
        self._file.write(tensor.numpy() if tensor.dtype in _OF_NUMPY else _bytes_of(tensor))  # type: ignore[arg-type]

    def copy(self, name: str, source: TensorReader, as_stored: str) -> None:
        """Write the next tensor as another one is in another file."""
        stored = self._next(name)
        with source.path.open("rb", buffering=0) as file:
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
        if (word := _WORDS.get(tensor.dtype)) is None:
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


__all__ = ["DTYPES", "ORDER", "OpenTensors", "Stored", "TensorReader", "TensorWriter", "write_tensors"]
