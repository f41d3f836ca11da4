"""Pieces through torch's distributed checkpoint: every rank writes what it owns and reads what it has.

What is written knows no layout: a piece is rectangles of a logical tensor, and reading cuts other rectangles out of
the same tensor.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lorica.checkpoint.pieces import Piece
from lorica.checkpoint.shards import ShardReader, ShardWriter
from lorica.errors import CheckpointError
from lorica.layout import Box


def save(directory: Path, pieces: Sequence[Piece], *, finish: Callable[[], None], group: Any = None) -> None:
    """Write what the ranks own of ``pieces`` into ``directory``, which has to be there; all ranks call together.

    Args:
        finish: called by the first rank once everything is written.
        group: ranks that write; None: all of them.

    Raises:
        CheckpointError: a tensor is held by nobody, or a rank could not write.
        OSError: the only rank there is could not write.
    """
    writer, planner = _Writer(directory, finish), _SavePlanner(pieces)
    _quiet()
    with _readable():
        state_dict_saver.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=_alone())


def save_later(
    directory: Path, pieces: Sequence[Piece], *, finish: Callable[[], None], group: Any = None
) -> Callable[[], None]:
    """Like :func:`save`, from copies, while training goes on.

    Args:
        group: ranks that write, of a group that nothing else uses meanwhile and that carries CPU tensors.

    Returns:
        a function that waits until all is written, and raises what went wrong.
    """
    writer, planner = _Writer(directory, finish), _SavePlanner([_copied(piece) for piece in pieces])
    _quiet()
    found: Any = state_dict_saver.async_save(
        {}, storage_writer=writer, planner=planner, process_group=group, no_dist=_alone()
    )
    future: Future[Any] = getattr(found, "upload_completion", found)

    def wait() -> None:
        with _readable():
            future.result()

    return wait


def load(reader: ShardReader, pieces: Sequence[Piece], *, group: Any = None) -> None:
    """Fill the tensors of ``pieces``; all ranks call together.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, or a file is damaged.
    """
    _quiet()
    with _readable():
        state_dict_loader.load(
            {}, storage_reader=reader, planner=_LoadPlanner(pieces), process_group=group, no_dist=_alone()
        )


class _Writer(ShardWriter):
    def __init__(self, directory: Path, finish: Callable[[], None]) -> None:
        super().__init__(directory)
        self._finish = finish

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        self._finish()


class _SavePlanner(SavePlanner):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._boxes = {
            MetadataIndex(piece.name, _offsets(box)): (piece, box)
            for piece in pieces
            for box, owned in zip(piece.boxes, piece.owned, strict=True)
            if owned
        }

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(index, piece, box) for index, (piece, box) in self._boxes.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, known in metadata.state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata)
            held = sum(chunk.sizes.numel() for chunk in known.chunks)
            if held != known.size.numel():
                raise CheckpointError(f"{name}: the ranks hold {held} of its {known.size.numel()} elements")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        piece, box = self._boxes[write_item.index]
        return piece.tensor[box.local].detach()


class _LoadPlanner(LoadPlanner):
    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = {piece.name: piece for piece in pieces}
        self._metadata = Metadata({})

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([item for piece in self._pieces.values() for item in self._reads(piece)])

    def _reads(self, piece: Piece) -> list[ReadItem]:
        stored = self._metadata.state_dict_metadata.get(piece.name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{piece.name} is missing")
        if stored.size != piece.shape or stored.properties.dtype != piece.tensor.dtype:
            raise CheckpointError(
                f"{piece.name} is {list(stored.size)} of {stored.properties.dtype}, "
                f"this run needs {list(piece.shape)} of {piece.tensor.dtype}"
            )
        return create_read_items_for_chunk_list(piece.name, stored, [_chunk(box) for box in piece.boxes])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError("sharded state holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self._pieces[read_item.dest_index.fqn]
        target = piece.tensor[piece.boxes[read_item.dest_index.index or 0].local]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _item(index: MetadataIndex, piece: Piece, box: Box) -> WriteItem:
    properties = TensorProperties(dtype=piece.tensor.dtype)
    data = TensorWriteData(chunk=_chunk(box), properties=properties, size=torch.Size(piece.shape))
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


def _offsets(box: Box) -> torch.Size:
    return torch.Size(side.start for side in box.logical)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(_offsets(box), torch.Size(side.stop - side.start for side in box.logical))


def _copied(piece: Piece) -> Piece:
    return replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True))


def _alone() -> bool:
    return not dist.is_available() or not dist.is_initialized()


def _quiet() -> None:
    # One process is no mistake; in a thread of its own torch says this where no context of ours reaches.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what torch gathers from the ranks into the error of the first that failed."""
    try:
        yield
    except CheckpointException as error:
        own, _ = error.failures.get(0 if _alone() else dist.get_rank(), (None, None))
        if isinstance(own, KeyboardInterrupt):  # torch gathers also what is no error, and stops only this rank
            raise own from None
        if _alone() and isinstance(own, (OSError, CheckpointError)):
            raise own from None
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{'' if _alone() else f'rank {rank}: '}{str(cause) or type(cause).__name__}") from cause
