"""The header of a safetensors file: read once, and checked as a whole before anything is made of what it says.

A file is eight bytes with the length of a JSON object, that object, and the bytes of the tensors one behind the other
(https://github.com/huggingface/safetensors#format). Everything here is a stranger's word: the length is compared with
the file before it is read, the number of things in the text before it is parsed, and each tensor's shape, dtype and
place with one another and with the length of the file.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorica.errors import CheckpointError, shown
from lorica.files.json import first_twice
from lorica.files.opening import read_fully

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
WORDS = {dtype: word for word, dtype in DTYPES.items()} | {
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
#: Bits of an element of each dtype that the format knows.
_BITS = {word: dtype.itemsize * 8 for dtype, word in WORDS.items()} | {
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

#: Bounds of what is parsed. The largest adapters there are (a pair for each of 138,000 experts' projections) have a
#: header of 24 MB; what is within these bounds takes less than 200 MB and a second to be refused.
MAX_BYTES = 32 * 1024 * 1024
MAX_TENSORS = 140_000
#: Text that is not ASCII takes up to four times its bytes in memory.
_MAX_OTHER_BYTES = 4 * 1024 * 1024
#: What may occur in the text, for each tensor: the object itself, two lists, and the commas in between.
_MAX_OF = {b"{": MAX_TENSORS + 2, b"[": 2 * MAX_TENSORS, b",": 8 * MAX_TENSORS}
_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_NAME, _MAX_DIMENSIONS, _MAX_LENGTH, _MAX_ELEMENTS = 2048, 64, 2**48, 2**60
#: How files of ``torch.save`` and ``pickle`` begin.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


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
        return Stored(WORDS[dtype], self.shape, 0, math.prod(self.shape) * dtype.itemsize)


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        tensors: name → where it lies, in the file's order.
        metadata: words about the file.
    """

    tensors: dict[str, Stored]
    metadata: dict[str, str]


class _WrongError(ValueError):
    """What is wrong with a header."""


def read_header(file: FileIO, path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        file: the open file, at its beginning.
        path: its name, for messages.

    Raises:
        CheckpointError: it is no whole safetensors file: too short or too long, too much to parse, not JSON, tensors
            that overlap, leave gaps, or have other bytes than their shapes; the tensor is named.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        text, first = _text(file, size)
        with _without_collections():
            found = json.loads(text, object_pairs_hook=_entry)
            del text
            if not isinstance(found, dict):
                raise _WrongError("the header is no JSON object")
            metadata = _metadata(found.pop("__metadata__", {}))
            return Header(_tensors(found, first, size), metadata)
    except RecursionError:
        raise CheckpointError(f"{path}: not a readable safetensors file: its header is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the garbage collector from going through all new tuples again and again, which takes as long as reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _text(file: FileIO, size: int) -> tuple[str, int]:
    """Return the JSON text, and where the tensors begin."""
    head = read_fully(file, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        if head.startswith(_PICKLES):
            raise _WrongError("a pickle can run code when it is loaded, so lorica does not read it")
        raise _WrongError(f"a header of {length:,} bytes is not in a file of {size:,} bytes")
    if length > MAX_BYTES:
        raise _WrongError(f"a header of {length:,} bytes is too large (limit {MAX_BYTES:,})")
    data = read_fully(file, length)
    if len(data) < length:
        raise _WrongError("the file became shorter while it was read")
    if length > _MAX_OTHER_BYTES and not data.isascii():
        raise _WrongError(f"a header of {length:,} bytes that are not all ASCII (limit {_MAX_OTHER_BYTES:,})")
    if any(data.count(character) > most for character, most in _MAX_OF.items()):
        raise _WrongError(f"the header has too many tensors (limit {MAX_TENSORS:,}) or says too much of them")
    return data.decode(), 8 + length


def _entry(pairs: list[tuple[str, Any]]) -> Any:
    """Return what the header says of one tensor as a triple, any other object as it is."""
    if len(pairs) == len(_FIELDS):
        (one, word), (two, shape), (three, offsets) = pairs
        if (one, two, three) == _FIELDS:  # as all that write such files have them
            return word, shape, offsets
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _WrongError(f"the key {shown(first_twice(name for name, _ in pairs))!r} stands twice in the header")
    return tuple(found[name] for name in _FIELDS) if found.keys() == {*_FIELDS} else found


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value.values()):
        raise _WrongError("__metadata__ does not map words to words")
    return value


def _tensors(found: dict[str, Any], first: int, size: int) -> dict[str, Stored]:
    """Return the tensors in the file's order, having seen that they lie one behind the other up to the file's end."""
    listed = [(name, _stored(name, value, first)) for name, value in found.items()]
    listed.sort(key=_place)
    place = first
    for name, stored in listed:
        if stored.start != place:
            what = "overlap" if stored.start < place else "leave a gap"
            why = f"data_offsets begin at {stored.start - first}, where the one before ends at {place - first}"
            raise _wrong(name, f"{why}; tensors must not {what}")
        place = stored.stop
    if place != size:
        raise _WrongError(f"the tensors end at byte {place:,} of a file of {size:,} bytes")
    return dict(listed)


def _place(item: tuple[str, Stored]) -> tuple[int, int]:
    return item[1].start, item[1].stop


def _stored(name: str, value: Any, first: int) -> Stored:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise _wrong(name, f"a name of more than {_MAX_NAME:,} characters, or with some that do not print")
    if type(value) is not tuple:
        raise _wrong(name, "needs dtype, shape and data_offsets, and nothing else")
    word, shape, offsets = value
    bits = _BITS.get(word) if type(word) is str else None
    if bits is None:
        raise _wrong(name, f"dtype {shown(word)} is none of the format's")
    if type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        raise _wrong(name, f"shape is no list of at most {_MAX_DIMENSIONS} lengths")
    if type(offsets) is not list or len(offsets) != 2:
        raise _wrong(name, "data_offsets are not two numbers")
    for length in (*shape, *offsets):  # runs for every tensor of a file: a function for each number costs as much again
        if type(length) is not int or not 0 <= length < _MAX_LENGTH:
            raise _wrong(name, f"{shown(length)} in its shape or data_offsets is no length that a file can have")
    start, stop = offsets
    elements = math.prod(shape)
    if elements * bits != 8 * (stop - start):
        raise _wrong(name, f"shape {shape} of {word} and data_offsets {offsets} are not of one length")
    if not elements and math.prod(length or 1 for length in shape) > _MAX_ELEMENTS:
        raise _wrong(name, f"shape {shape} overflows")
    return Stored(word, tuple(shape), first + start, first + stop)


def _wrong(name: str, why: str) -> _WrongError:
    return _WrongError(f"tensor {shown(name)}: {why}")


__all__ = ["DTYPES", "MAX_BYTES", "MAX_TENSORS", "WORDS", "Header", "Stored", "read_header"]
