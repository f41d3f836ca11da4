"""What a rank keeps of a tensor between forwards, which fully-sharded parallelism makes less than it computes with.

A ``DTensor``'s mesh axes are of two kinds: those that a layer's layout cuts, over which the layer also computes in
parts, and those that only storage knows, over which the tensor is gathered before every forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from lorica.engines.kinds import is_distributed
from lorica.engines.site import Axis, Site
from lorica.layout.cuts import chunk

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Held(NamedTuple):
    """What this rank keeps: the local tensor, and for each dimension its place in the tensor of a forward."""

    local: Tensor
    slices: tuple[slice, ...]


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient of a parameter: where Megatron's DDP collects it, the one in its buffer."""
    held: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if held is None else held


def storage_axes(tensor: Tensor, site: Site | None = None) -> list[tuple[int, Axis]]:
    """Return the dimension and the axis of every shard that only storage knows, outermost first."""
    if not is_distributed(tensor):
        return []
    computed = {cut.axis for cut in site.layout.cuts} if site is not None else set()
    found = []
    for dim, placement in enumerate(tensor.placements):
        axis = Axis.of(tensor.device_mesh, dim)
        if hasattr(placement, "dim") and axis.name not in computed:
            found.append((placement.dim % tensor.ndim, axis))
    return found


def at_rest(tensor: Tensor, site: Site | None = None) -> Held:
    """Return what this rank keeps of a parameter."""
    if not is_distributed(tensor):
        return Held(tensor, (slice(None),) * tensor.ndim)
    slices = [slice(None)] * tensor.ndim
    shards = storage_axes(tensor, site)
    for dim, axis in shards:
        slices[dim] = slice(*chunk(_in_forward(tensor, site, dim), axis.size, axis.rank))
    return Held(tensor.to_local(), tuple(slices))


def _in_forward(tensor: DTensor, site: Site | None, dim: int) -> int:
    """Return this rank's length of a dimension while it computes."""
    length = tensor.shape[dim]
    if site is None:
        return length
    for index, placement in enumerate(tensor.placements):
        axis = Axis.of(tensor.device_mesh, index)
        for cut in site.layout.cuts:
            if cut.axis == axis.name and hasattr(placement, "dim") and placement.dim % tensor.ndim == dim:
                return cut.length(axis.rank)
    return length


def unshard(tensor: Tensor) -> Tensor:
    """Return a factor as it is in a forward; one collective where fully-sharded parallelism shards it."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor
