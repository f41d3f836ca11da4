"""From what the ranks hold to the logical tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.engines.kinds import is_distributed
from lorica.engines.rest import storage_axes
from lorica.engines.site import Axis, Site
from lorica.layout import Layout, Roles
from lorica.layout.cuts import chunk


def gather_parameter(parameter: Tensor, site: Site, roles: Roles) -> Tensor:
    """Return the logical tensor of a parameter as it is at rest, on every rank that takes part.

    Collective over the axes that shard it; the logical tensor is held once by each rank.
    """
    local = parameter.to_local() if is_distributed(parameter) else parameter
    whole = _logical_shape(parameter, site, roles)
    computed = site.layout.local_shape(roles, whole, site.at)
    for dim, axis in reversed(storage_axes(parameter, site)):
        local = _concatenate(local, dim, computed[dim], axis)
    return gather(local, site.layout, roles, whole, site.axes)


def gather(local: Tensor, layout: Layout, roles: Roles, shape: Sequence[int], axes: Mapping[str, Axis]) -> Tensor:
    """Return the logical tensor of ``shape`` from the local ones of all ranks on the axes that cut it."""
    over = [axes[name] for name in layout.sharded(roles) if axes[name].size > 1]
    at = {name: axis.rank for name, axis in axes.items()}
    if not over:
        as_it_is = tuple(local.shape) == tuple(shape) and layout.in_order(roles, at)
        return local if as_it_is else layout.assemble(shape, roles, [(at, local)])
    places: list[dict[str, int]] = [at]
    for axis in over:
        places = [place | {axis.name: rank} for rank in range(axis.size) for place in places]
    most = max(math.prod(layout.local_shape(roles, shape, place)) for place in places)
    flat = local.new_zeros(most)
    flat[: local.numel()] = local.reshape(-1)
    for axis in over:
        flat = _all_gather(flat, axis)
    held = []
    for place, row in zip(places, flat.view(len(places), most), strict=True):
        size = layout.local_shape(roles, shape, place)
        held.append((place, row[: math.prod(size)].view(size)))
    return layout.assemble(shape, roles, held)


def _all_gather(flat: Tensor, axis: Axis) -> Tensor:
    rows = flat.new_empty((axis.size, *flat.shape))
    dist.all_gather(list(rows.unbind(0)), flat, group=axis.group)
    return rows.flatten()


def _concatenate(local: Tensor, dim: int, length: int, axis: Axis) -> Tensor:
    """Return the tensor that the ranks on an axis hold in chunks along ``dim``."""
    step = chunk(length, axis.size, 0)[1]
    moved = local.movedim(dim, 0)
    padded = local.new_zeros((step, *moved.shape[1:]))
    padded[: moved.shape[0]] = moved
    rows = _all_gather(padded.flatten(), axis).view(axis.size * step, *moved.shape[1:])
    return rows[:length].movedim(0, dim).contiguous()


def _logical_shape(parameter: Tensor, site: Site, roles: Roles) -> torch.Size:
    sizes = site.layout.sizes
    return torch.Size(sizes.get(role, length) for role, length in zip(roles, parameter.shape, strict=True))
