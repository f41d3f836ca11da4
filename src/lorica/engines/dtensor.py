"""Weights that are ``DTensor``s: those of transformers' ``DistributedConfig`` and of torch's ``parallelize_module``.

Their placements say all that a layout needs. ``Shard`` is an even cut, ``_StridedShard`` one of several projections
that were packed along a dimension. Axes over which fully-sharded parallelism merely stores them are left out: there
the tensor is whole in every forward.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, cast

from lorica.engines.site import Axis
from lorica.errors import LayoutError
from lorica.layout import Cut, Roles, even, fused
from lorica.layout.cuts import Dim

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def cuts_of(weight: DTensor, roles: Roles, storage: Collection[str], where: str) -> tuple[Cut, ...]:
    """Return the cuts of a distributed weight.

    Args:
        weight: the parameter.
        roles: the role of each of its dimensions.
        storage: names of the axes over which it is gathered before every forward.
        where: the module, for messages.

    Raises:
        LayoutError: a placement cannot be described; names it.
    """
    cuts = []
    for index, placement in enumerate(weight.placements):
        axis = Axis.of(weight.device_mesh, index)
        if axis.name in storage or placement.is_replicate() or axis.size == 1:
            continue
        cuts.append(_cut(placement, axis, roles, weight, where))
    return tuple(cuts)


def _cut(placement: Placement, axis: Axis, roles: Roles, weight: DTensor, where: str) -> Cut:
    if not hasattr(placement, "dim"):
        raise LayoutError(f"{where}: a weight placed {placement} over {axis.name!r} cannot be adapted")
    dim = placement.dim % weight.ndim
    if roles[dim] not in ("out", "in", "expert"):
        raise LayoutError(f"{where}: dimension {dim} of the weight is cut over {axis.name!r}, which is not supported")
    role, length = cast(Dim, roles[dim]), weight.shape[dim]
    from torch.distributed.tensor.placement_types import _StridedShard

    if not isinstance(placement, _StridedShard):
        return even(axis.name, role, length, axis.size)
    step = -(-length // placement.split_factor)
    lengths = [min(step, length - start) for start in range(0, length, step)]
    return fused(axis.name, role, tuple(lengths), axis.size)
