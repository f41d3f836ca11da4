"""Every saved tensor as pieces: rectangles of a logical tensor under its name in a file, and where this rank has them.

Saving to one file, loading slices of it, and sharded training state all work on this table; none of them knows what a
layout is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.checkpoint.forms import FORMS
from lorica.checkpoint.names import Entry
from lorica.engines.kinds import is_distributed
from lorica.engines.rest import at_rest
from lorica.engines.site import Axis
from lorica.engines.stages import STAGES, has_others
from lorica.errors import CheckpointError
from lorica.layout import Box


@dataclass(frozen=True)
class Piece:
    """What one rank has of one logical tensor.

    Attributes:
        name: its name in a file.
        shape: the logical shape.
        boxes: which rectangles this rank has, in its own tensor and in the logical one.
        tensor: this rank's tensor, sharing the parameter's memory.
        owned: for each box, whether this rank is the one that writes it; others hold copies.
    """

    name: str
    shape: torch.Size
    boxes: tuple[Box, ...]
    tensor: Tensor
    owned: tuple[bool, ...]

    def read(self, source: Any) -> list[Tensor]:
        """Return this rank's rectangles of ``source``, a logical tensor or anything that slices index as one."""
        return [_index(source, box.logical) for box in self.boxes]

    @torch.no_grad()
    def write(self, parts: Sequence[Tensor]) -> None:
        """Write what :meth:`read` returned into this rank's tensor."""
        for box, part in zip(self.boxes, parts, strict=True):
            self.tensor[box.local] = part.to(self.tensor)


def _index(source: Any, slices: tuple[slice, ...]) -> Tensor:
    part: Tensor = source[slices] if slices else (source if isinstance(source, Tensor) else source[:])
    return part


def pieces(entries: Mapping[str, Entry]) -> list[Piece]:
    """Return this rank's pieces of all entries, by their names in a file; tied ones are pieces of their own."""
    return [piece_of(name, entry) for name, entry in entries.items()]


def piece_of(name: str, entry: Entry) -> Piece:
    """Return this rank's piece of one entry."""
    held = at_rest(entry.tensor.detach(), entry.site)
    shape = entry.whole_shape
    if entry.site is None:
        boxes = [Box(tuple(slice(0, size) for size in shape), tuple(slice(0, size) for size in shape))]
    else:
        boxes = entry.site.layout.boxes(entry.roles, shape, entry.site.at)
    boxes = [kept for box in boxes if (kept := _kept(box, held.slices)) is not None]
    owned = [_owns(entry, box) for box in boxes]
    if entry.window is not None:
        seen = [(_seen(box, entry.window), mine) for box, mine in zip(boxes, owned, strict=True)]
        boxes, owned = [box for box, _ in seen if box is not None], [mine for box, mine in seen if box is not None]
    if (form := FORMS.get(entry.roles)) is None:
        return Piece(name, entry.shape, tuple(boxes), held.local, tuple(owned))
    turned = [(part, mine) for box, mine in zip(boxes, owned, strict=True) for part in form.boxes(box, shape)]
    view = form.view(held.local)
    return Piece(name, entry.shape, tuple(box for box, _ in turned), view, tuple(mine for _, mine in turned))


def _seen(box: Box, window: Sequence[slice]) -> Box | None:
    """Return what is left of a box when only ``window`` of the logical tensor is meant, whose corner becomes 0."""
    turned = _kept(Box(box.logical, box.local), window)
    return None if turned is None else Box(turned.logical, turned.local)


def _kept(box: Box, slices: Sequence[slice]) -> Box | None:
    """Return what is left of a box when only ``slices`` of the local tensor are kept; None if nothing is."""
    local, logical = [], []
    for inside, outside, kept in zip(box.local, box.logical, slices, strict=True):
        first = 0 if kept.start is None else kept.start
        start = max(inside.start, first)
        stop = inside.stop if kept.stop is None else min(inside.stop, kept.stop)
        if start >= stop:
            return None
        local.append(slice(start - first, stop - first))
        logical.append(slice(outside.start + start - inside.start, outside.start + stop - inside.start))
    return Box(tuple(local), tuple(logical))


def _owns(entry: Entry, box: Box) -> bool:
    """Whether this rank is the first of those that hold a box."""
    site, tensor = entry.site, entry.tensor
    stored = {}
    if is_distributed(tensor):
        axes = [Axis.of(tensor.device_mesh, dim) for dim in range(tensor.device_mesh.ndim)]
        stored = {axis.name: (axis, place) for axis, place in zip(axes, tensor.placements, strict=True)}
    if any(axis.rank for axis, placement in stored.values() if placement.is_replicate()):
        return False
    if site is None:
        return bool(stored) or _rank() == 0
    cut = site.layout.sharded(entry.roles)
    for name, axis in site.axes.items():
        if name in cut:
            if not _first_copy(entry, box, axis):
                return False
        elif axis.rank and name != STAGES and name not in site.apart and name not in stored:
            return False
    return True


def _first_copy(entry: Entry, box: Box, axis: Axis) -> bool:
    assert entry.site is not None
    for dim, role in enumerate(entry.roles):
        found = entry.site.layout.cut_of(role)
        if found is not None and found.axis == axis.name and found.copies > 1:
            start = box.logical[dim].start
            holders = (rank for rank, held in enumerate(found.held) if any(a <= start < b for a, b in held))
            return axis.rank == next(holders)
    return True


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def here(name: str, entry: Entry) -> Tensor:
    """Return the tensor that a file has of an entry, all of which is on this rank."""
    piece = piece_of(name, entry)
    logical = torch.empty(piece.shape, dtype=piece.tensor.dtype)
    for box in piece.boxes:
        logical[box.logical] = piece.tensor[box.local]
    return logical


# ---- one rank gets everything ---------------------------------------------------------------------------------------


def collect(mine: Sequence[Piece]) -> dict[str, Tensor]:
    """Return the logical tensors on rank 0, on the CPU, and nothing on the other ranks; all ranks call it together.

    Args:
        mine: this rank's pieces.

    Raises:
        CheckpointError: nobody holds some part of a tensor; names it.
    """
    parts = _parts(mine)
    listings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(listings, [(p.name, tuple(p.shape), p.tensor.dtype, box) for p, box in parts])
    buffer = _buffer(parts)
    if dist.get_rank() != 0:
        if buffer.numel():
            dist.send(buffer, 0)
        return {}
    result: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for rank, listing in enumerate(listings):
        if rank:
            size = sum(_bytes(box, dtype) for _, _, dtype, box in listing)
            buffer = torch.empty(size, dtype=torch.uint8, device=buffer.device)
            if size:
                dist.recv(buffer, rank)
        place, received = 0, buffer.cpu()
        for name, shape, dtype, box in listing:
            size = _bytes(box, dtype)
            values = received[place : place + size].clone().view(dtype).view(_shape(box))
            place += size
            result.setdefault(name, torch.empty(shape, dtype=dtype))[box] = values
            filled[name] = filled.get(name, 0) + values.numel()
    for name, tensor in result.items():
        if filled[name] != tensor.numel():
            raise CheckpointError(f"{name}: the ranks hold {filled[name]} of its {tensor.numel()} elements")
    return result


def _parts(mine: Iterable[Piece]) -> list[tuple[Piece, tuple[slice, ...]]]:
    return [
        (piece, box.logical) for piece in mine for box, owned in zip(piece.boxes, piece.owned, strict=True) if owned
    ]


def _buffer(parts: Sequence[tuple[Piece, tuple[slice, ...]]]) -> Tensor:
    device = torch.device("cpu") if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    flat = []
    for piece, logical in parts:
        box = next(box for box in piece.boxes if box.logical == logical)
        flat.append(piece.tensor[box.local].contiguous().reshape(-1).view(torch.uint8).to(device))
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)


def _shape(box: tuple[slice, ...]) -> list[int]:
    return [side.stop - side.start for side in box]


def _bytes(box: tuple[slice, ...], dtype: torch.dtype) -> int:
    return math.prod(_shape(box)) * dtype.itemsize


def lie_over_ranks(model: nn.Module, entries: Mapping[str, Entry]) -> bool:
    """Whether ranks hold different tensors of an adapter, or parts of them, so that they have to be saved together.

    Args:
        model: the base model.
        entries: what this rank has of the adapter.
    """
    if has_others(model):
        return True
    for entry in entries.values():
        if is_distributed(entry.tensor):
            return True
        if entry.site is not None and any(entry.site.axes[n].size > 1 for n in entry.site.layout.sharded(entry.roles)):
            return True
    return False
