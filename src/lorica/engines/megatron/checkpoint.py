"""Adapted layers in Megatron's distributed checkpoints.

Base tensors keep the names they have without an adapter. Factors are saved as what they are logically: the tensor of
each projection, under a name of its own, in even pieces. So a checkpoint is read on any other division.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.engines.registry import Offsets, Windows
from lorica.engines.site import Site
from lorica.layout import Roles


class _Piece(NamedTuple):
    """An even piece of a logical tensor.

    Attributes:
        end: of the tensor's name in the checkpoint.
        local: where it is in this rank's tensor.
        offsets: (dimension, place, pieces) of each dimension that is divided.
    """

    end: str
    local: tuple[slice, ...]
    offsets: tuple[tuple[int, int, int], ...]


def state_of(module: nn.Module, prefix: str, sharded_offsets: Offsets, metadata: Any) -> dict[str, Any]:
    """Return the sharded state of a module that is not adapted, as Megatron gives it."""
    from megatron.core import parallel_state
    from megatron.core.transformer import utils

    group = getattr(module, "tp_group", None) or parallel_state.get_tensor_model_parallel_group()
    state: dict[str, Any] = utils.sharded_state_dict_default(module, prefix, sharded_offsets, metadata, group)
    return state


def sharded(
    tensor: Tensor, key: str, end: str, windows: Windows, roles: Roles, site: Site | None, offsets: Offsets
) -> Any:
    """Return a factor for Megatron's distributed checkpoint.

    Args:
        tensor: what this rank has.
        key: its name; modules around it may change the beginning later.
        end: the end of it that differs for each of the logical tensors.
        windows: the ends of the names of the logical tensors it is made of.
        roles: of its dimensions.
        site: where it lies.
        offsets: those of the modules around it.

    Returns:
        A ``ShardedTensor``, a ``ShardedTensorFactory`` where there are several pieces, or what keeps the tensor as it
        is where this rank has no rows of a projection that is adapted.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory

    pieces = list(_pieces(tensor, windows, roles, site))
    if not pieces:
        return LocalNonpersistentObject(tensor)
    first = len(offsets)

    def build(key: str, values: Tensor, replica_id: Any, flattened_range: Any = None) -> list[Any]:
        del flattened_range
        return [
            ShardedTensor.from_rank_offsets(
                key.removesuffix(end) + piece.end,
                values[piece.local],
                *offsets,
                *((dim + first, place, count) for dim, place, count in piece.offsets),
                replica_id=replica_id,
                prepend_axis_num=first,
            )
            for piece in pieces
        ]

    @torch.no_grad()
    def merge(parts: Sequence[Tensor]) -> Tensor:
        values = torch.zeros_like(tensor)  # rows of projections that are not adapted have no tensor
        for piece, part in zip(pieces, parts, strict=True):
            values[piece.local] = part
        return values

    replica = _replica(roles, site)
    whole = len(pieces) == 1 and tensor[pieces[0].local].shape == tensor.shape
    if whole:
        return build(key, tensor, replica)[0]
    return ShardedTensorFactory(key, tensor, build, merge, replica)


def _replica(roles: Roles, site: Site | None) -> tuple[int, int, int]:
    """Return the number of this rank's copy among those with the same piece; (0, 0, 0) is the one that is written."""
    if site is None:
        return (0, 0, 0)
    cut = set(site.layout.sharded(roles))
    data = {*site.layout.data, *site.layout.sequence}
    whole = [axis.rank for name, axis in site.axes.items() if name not in cut and name not in data | {*site.apart}]
    batches = [axis.rank for name, axis in site.axes.items() if name in data and name not in cut]
    return (0, max(whole, default=0), max(batches, default=0))


def _pieces(tensor: Tensor, windows: Windows, roles: Roles, site: Site | None) -> Iterator[_Piece]:
    for end, window in windows:
        if site is None:
            yield _Piece(end, tuple(slice(0, size) for size in tensor.shape), ())
            continue
        yield from _of_window(end, window, tensor, roles, site)


def _of_window(
    end: str, window: tuple[slice, ...] | None, tensor: Tensor, roles: Roles, site: Site
) -> Iterator[_Piece]:
    sizes: Mapping[str, int] = site.layout.sizes
    shape = [sizes.get(role, size) for role, size in zip(roles, tensor.shape, strict=True)]
    wanted = window or tuple(slice(0, size) for size in shape)
    units = [_unit(role, side, site) for role, side in zip(roles, wanted, strict=True)]
    for box in site.layout.boxes(roles, shape, site.at):
        sides = [
            list(_cells(local, logical, side, unit))
            for local, logical, side, unit in zip(box.local, box.logical, wanted, units, strict=True)
        ]
        yield from _grid(end, sides, [side.stop - side.start for side in wanted], units)


def _grid(end: str, sides: list[list[tuple[slice, int]]], shape: list[int], units: list[int]) -> Iterator[_Piece]:
    """Yield the pieces that the cells of all dimensions make together."""
    cells: list[tuple[tuple[slice, ...], tuple[int, ...]]] = [((), ())]
    for side in sides:
        cells = [((*local, part), (*places, place)) for local, places in cells for part, place in side]
    for local, places in cells:
        counts = [size // unit for size, unit in zip(shape, units, strict=True)]
        found = [(dim, place, count) for dim, (place, count) in enumerate(zip(places, counts, strict=True))]
        yield _Piece(end, local, tuple(one for one in found if one[2] > 1))


def _cells(local: slice, logical: slice, wanted: slice, unit: int) -> Iterator[tuple[slice, int]]:
    """Yield the cells of ``unit`` positions that an interval has of what is wanted: where each is, and its number."""
    start, stop = max(logical.start, wanted.start), min(logical.stop, wanted.stop)
    for first in range(start, stop, unit):
        place = local.start + first - logical.start
        yield slice(place, place + unit), (first - wanted.start) // unit


def _unit(role: str, wanted: slice, site: Site) -> int:
    """Return the largest length of cells that no rank's intervals of a dimension divide: the same on every rank."""
    cut = site.layout.cut_of(role)
    length: int = wanted.stop - wanted.start
    if cut is None:
        return length
    edges = {edge for held in cut.held for interval in held for edge in interval}
    unit: int = functools.reduce(
        math.gcd, (edge - wanted.start for edge in edges if wanted.start < edge < wanted.stop), length
    )
    return unit


__all__ = ["sharded", "state_of"]
