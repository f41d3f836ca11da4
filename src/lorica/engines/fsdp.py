"""torch's ``fully_shard`` (FSDP2) and ``DistributedDataParallel``: engines that divide batches (FSDP storage too)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lorica.engines.kinds import is_fully_sharded
from lorica.engines.site import Axis


def meshes(model: nn.Module) -> Iterator[DeviceMesh]:
    """Yield the data-parallel mesh of every group of parameters that ``fully_shard`` manages."""
    seen: list[DeviceMesh] = []
    for group in _groups(model):
        if not any(group.mesh_info.mesh is mesh for mesh in seen):
            seen.append(group.mesh_info.mesh)
            yield group.mesh_info.mesh


def managed(model: nn.Module) -> set[int]:
    """Return the identities of the parameters, as they are at rest, that ``fully_shard`` manages."""
    reshard(model)
    return {id(managed.sharded_param) for group in _groups(model) for managed in group.fsdp_params}


def _groups(model: nn.Module) -> list[Any]:
    """Return the groups of parameters inside a model, and of what stands around it and runs forwards with it."""
    if not dist.is_available() or not dist.is_initialized():
        return []  # without looking at every module: nothing is sharded on one process
    states: dict[int, Any] = {}
    for module in model.modules():
        if is_fully_sharded(module):
            state: Any = module._get_fsdp_state()
            states.update((id(one), one) for one in [state, *state._state_ctx.all_states])
    groups = (getattr(one, "_fsdp_param_groups", None) or [one._fsdp_param_group] for one in states.values())
    return [group for found in groups for group in found if group is not None]


def reshard(model: nn.Module) -> None:
    """Let every parameter be what it is at rest; what is written into a gathered one would be lost."""
    for group in _groups(model):
        group.reshard()


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
