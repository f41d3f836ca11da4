"""torch's ``fully_shard`` (FSDP2) and ``DistributedDataParallel``: engines that divide batches (FSDP storage too)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lorica.engines.kinds import is_fully_sharded
from lorica.engines.site import Axis


def meshes(model: nn.Module) -> Iterator[DeviceMesh]:
    """Yield the data-parallel mesh of every group of parameters that ``fully_shard`` manages."""
    seen: list[DeviceMesh] = []
    for module in model.modules():
        if not is_fully_sharded(module):
            continue
        for group in _groups(module._get_fsdp_state()):
            if not any(group.mesh_info.mesh is mesh for mesh in seen):
                seen.append(group.mesh_info.mesh)
                yield group.mesh_info.mesh


def managed(model: nn.Module) -> set[int]:
    """Return the identities of the parameters, as they are at rest, that ``fully_shard`` manages."""
    reshard(model)
    states = (module._get_fsdp_state() for module in model.modules() if is_fully_sharded(module))
    groups = (group for state in states for group in _groups(state))
    return {id(managed.sharded_param) for group in groups for managed in group.fsdp_params}


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def reshard(model: nn.Module) -> None:
    """Let every parameter be what it is at rest; what is written into a gathered one would be lost."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()


def data_axes(model: nn.Module) -> dict[str, Axis]:
    """Return the axes over which ``fully_shard`` or DDP divides batches."""
    found: dict[str, Axis] = {}
    for mesh in meshes(model):
        for dim in range(mesh.ndim):
            axis = Axis.of(mesh, dim)
            found.setdefault(axis.name, axis)
    if isinstance(model, DistributedDataParallel):
        group = model.process_group
        found["ddp"] = Axis("ddp", group.size(), group.rank(), group)
    return found
