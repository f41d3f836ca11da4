"""Whole tensors of a file, many at once: one read for those that lie together, one pass that looks for NaN.

The file is read and not mapped. A mapped file is part of the model for as long as it is used: somebody who writes over
it changes the weights, and somebody who truncates it ends the process. What is read is the model's own, and takes the
same memory as a mapped file of which every page has been used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorica.checkpoint.reading import beyond, is_finite
from lorica.errors import CheckpointError
from lorica.files.tensors import OpenTensors, TensorReader

#: What was read is looked at while it is still in the processor's cache.
_CHUNK_BYTES = 2 * 1024 * 1024


def read_whole(reader: TensorReader, wanted: Mapping[str, torch.dtype | None]) -> dict[str, Tensor]:
    """Return tensors of a file, on the CPU; of the rest of the file nothing is read.

    Those that lie one behind the other share a block of memory, which stays until the last of them is gone. To torch
    each has a storage and a version of its own, so that nobody takes them for tied, and writing to one does not
    concern the others.

    Args:
        reader: the file.
        wanted: name in the file → the dtype to be returned in; None: as it is stored.

    Raises:
        CheckpointError: a tensor is not finite, or has a dtype that cannot be computed with; it is named. Or the file
            became shorter.
    """
    found: dict[str, Tensor] = {}
    with reader.opened() as file:
        for run in _runs(reader, wanted):
            found.update(_read_run(file, run, wanted[run[0]] or reader.dtype_of(run[0])))
    return found


def read_all(reader: TensorReader) -> dict[str, Tensor]:
    """Return all tensors of a file as they are stored; see :func:`read_whole`."""
    return read_whole(reader, dict.fromkeys(reader.tensors))


def _runs(reader: TensorReader, wanted: Mapping[str, torch.dtype | None]) -> list[list[str]]:
    """Return names of tensors that lie one behind the other and are alike in their dtypes, in the file's order."""
    runs: list[list[str]] = []
    end: tuple[int, str, torch.dtype | None] | None = None
    for name, stored in reader.tensors.items():
        if name in wanted:
            if end != (stored.start, stored.word, wanted[name]):
                runs.append([])
            runs[-1].append(name)
            end = (stored.stop, stored.word, wanted[name])
    return runs


def _read_run(file: OpenTensors, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors, source = file.reader.tensors, file.reader.dtype_of(names[0])
    first = tensors[names[0]].start
    memory = torch.empty((tensors[names[-1]].stop - first) // source.itemsize, dtype=dtype)
    _fill(file, names, memory, source)
    block = memory.view(torch.uint8).numpy()
    found = {}
    for name in names:
        stored = tensors[name]
        count = math.prod(stored.shape)
        place = (stored.start - first) // source.itemsize * dtype.itemsize
        flat = torch.frombuffer(block, dtype=dtype, count=count, offset=place) if count else memory[:0].clone()
        found[name] = flat.view(stored.shape)
    return found


def _fill(file: OpenTensors, names: Sequence[str], memory: Tensor, source: torch.dtype) -> None:
    """Read a run into ``memory``, in chunks of which each is checked before the next one is read."""
    at, step = file.reader.tensors[names[0]].start, _CHUNK_BYTES // source.itemsize
    converts = memory.dtype is not source
    scratch = torch.empty(min(step, len(memory)), dtype=source) if converts else memory
    for start in range(0, len(memory), step):
        goal = memory[start : start + step]
        part = scratch[: len(goal)] if converts else goal
        place = at + start * source.itemsize
        file.read_into(part, place)
        if not is_finite(part, memory.dtype):
            _complain(file, names, part, place, memory.dtype)
        if converts:
            goal.copy_(part)


def _complain(file: OpenTensors, names: Sequence[str], part: Tensor, place: int, dtype: torch.dtype) -> None:
    """Name the tensor that is not finite.

    Args:
        names: the tensors it may be.
        part: what was read.
        place: where in the file that begins.
        dtype: that it is for.
    """
    for name in names:
        stored = file.reader.tensors[name]
        start, stop = ((edge - place) // part.itemsize for edge in (stored.start, stored.stop))
        values = part[max(start, 0) : max(stop, 0)]
        if not is_finite(values, dtype):
            raise CheckpointError(f"{file.reader.path}: {name} holds NaN or infinity{beyond(part.dtype, dtype)}")
