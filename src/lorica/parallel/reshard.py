"""Sharded state for a layout, written by one process: what each rank would have written, rank after rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lorica.checkpoint.names import WEIGHTS_NAME, adapter_entries
from lorica.checkpoint.pieces import piece_of
from lorica.checkpoint.shards import Shard, Stored, file_of, key_of, opened, read_index, read_shard, write_index
from lorica.checkpoint.whole import FACTORS
from lorica.config import LoraConfig
from lorica.errors import CheckpointError, suggest
from lorica.files import atomic
from lorica.files.tensors import TensorReader
from lorica.model import get_peft_model
from lorica.parallel.plan import Division, divide, empty_model, fake_ranks

_OPTIMIZER = "optimizer/"
Rectangle = tuple[slice, ...]


class Source(Protocol):
    """Logical tensors of which rectangles can be read."""

    index: Mapping[str, Stored]

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return one rectangle of a tensor."""


class Shards:
    """Sharded state as a source, whatever the layout that wrote it."""

    def __init__(self, state: Path, files: ExitStack) -> None:
        self.index: Mapping[str, Stored] = read_index(state)
        self._state, self._files = state, files
        self._open: dict[str, Any] = {}

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Put the rectangle together from all shards that have some of it."""
        stored = self.index[name]
        result = torch.empty([side.stop - side.start for side in rectangle], dtype=stored.dtype)
        for shard in stored.shards:
            if (common := _common(shard, rectangle)) is None:
                continue
            path = self._state / shard.file
            if shard.file not in self._open:
                self._open[shard.file] = self._files.enter_context(opened(path))
            inside = tuple(slice(a - at, b - at) for (a, b), at in zip(common, shard.offsets, strict=True))
            place = tuple(slice(a - side.start, b - side.start) for (a, b), side in zip(common, rectangle, strict=True))
            result[place] = read_shard(self._open[shard.file], path, name, shard, stored, inside)
        return result


class OneFile:
    """An adapter's file as a source."""

    def __init__(self, file: Path, files: ExitStack) -> None:
        reader = TensorReader(file)
        self._source = files.enter_context(reader.opened())
        self.index: Mapping[str, Stored] = {
            FACTORS + name: Stored(shape, reader.dtype_of(name), ()) for name, shape in reader.shapes.items()
        }

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle straight from the file."""
        return self._source.slices(name.removeprefix(FACTORS))[rectangle if rectangle else ...]


@contextmanager
def source_of(directory: Path) -> Iterator[Source]:
    """Open a checkpoint's state, or an adapter's one file.

    Raises:
        CheckpointError: the directory has neither, or it is damaged.
    """
    with ExitStack() as files:
        if (directory / "state").is_dir():
            yield Shards(directory / "state", files)
        elif (directory / WEIGHTS_NAME).is_file():
            yield OneFile(directory / WEIGHTS_NAME, files)
        else:
            raise CheckpointError(f"{directory} has neither sharded state nor {WEIGHTS_NAME}")


def reshard(
    source: Source,
    output: Path,
    model: Any,
    config: LoraConfig,
    division: Division,
    *,
    each: Callable[[int], object] = lambda rank: None,
) -> None:
    """Write the state that ranks of a layout would have written. One rank's share is held at a time.

    Args:
        source: the state as it is.
        output: a directory for index and shards; it is there.
        model: the base model's transformers configuration.
        config: the adapter's.
        division: the layout.
        each: told each rank that is done.

    Raises:
        LayoutError: the model cannot be divided so.
        CheckpointError: the source lacks a tensor, or has one that no rank has.
    """
    shards: dict[str, list[Shard]] = {}
    for rank in range(division.ranks):
        tensors: dict[str, Tensor] = {}
        for name, rectangles in _owned(source.index, model, config, division, rank).items():
            for rectangle in rectangles:
                offsets = tuple(side.start for side in rectangle)
                sizes = tuple(side.stop - side.start for side in rectangle)
                tensors[key_of(name, offsets)] = source.read(name, rectangle).contiguous()
                shards.setdefault(name, []).append(Shard(offsets, sizes, file_of(rank)))
        if tensors:
            atomic.write_tensors(output / file_of(rank), tensors, {"format": "pt"})
        each(rank)
    if homeless := source.index.keys() - shards.keys():
        raise CheckpointError(f"no rank of {division} has {sorted(homeless)[0]} (and {len(homeless) - 1} more)")
    index = source.index
    write_index(
        output, {name: Stored(index[name].shape, index[name].dtype, tuple(own)) for name, own in shards.items()}
    )
    read_index(output)  # which sees that every element is there once


def _owned(
    index: Mapping[str, Stored], model: Any, config: LoraConfig, division: Division, rank: int
) -> dict[str, list[Rectangle]]:
    """What a rank writes: name → rectangles."""
    found: dict[str, list[Rectangle]] = {}
    with fake_ranks(rank, division.ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = empty_model(model, torch.float32)
        divide(base, division)
        adapted = get_peft_model(base, config, low_cpu_mem_usage=True)
        entries = adapter_entries(adapted, "default", config)
        for name, entry in entries.items():
            if entry.tied:
                continue
            piece = piece_of(name, entry)
            if FACTORS + name not in index:
                raise CheckpointError(f"{name} is missing.{suggest(FACTORS + name, index, limit=1)}")
            mine = [box.logical for box, owned in zip(piece.boxes, piece.owned, strict=True) if owned]
            for key in _of(name, index):
                found[key] = mine if index[key].shape else [()] * any(_is_corner(box) for box in mine)
    if rank == 0:
        others = [name for name in index if not name.startswith((FACTORS, _OPTIMIZER))]
        found |= {name: [tuple(slice(0, size) for size in index[name].shape)] for name in others}
    return found


def _of(name: str, index: Mapping[str, Stored]) -> list[str]:
    """The factor and the optimiser's state of it."""
    return [FACTORS + name, *(key for key in index if key.startswith(f"{_OPTIMIZER}{name}/"))]


def _is_corner(rectangle: Rectangle) -> bool:
    return all(side.start == 0 for side in rectangle)


def _common(shard: Shard, rectangle: Rectangle) -> list[tuple[int, int]] | None:
    """The intervals that a shard and a rectangle share; None if there is nothing."""
    found = []
    for at, size, side in zip(shard.offsets, shard.sizes, rectangle, strict=True):
        start, stop = max(at, side.start), min(at + size, side.stop)
        if start >= stop:
            return None
        found.append((start, stop))
    return found
