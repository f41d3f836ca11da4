"""Megatron-Core's process groups as axes. Shoeybi et al. 2019 (tensor), Narayanan et al. 2021 (pipeline)."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lorica.engines.site import Axis

#: The mesh axes that Megatron's groups are: tensor, data (with context parallelism) and pipeline.
TENSOR, DATA, STAGES = "tp", "dp", "pp"


def axis_of(name: str, group: Any) -> Axis:
    """Return the axis of a process group; None, as without any process group, is one rank."""
    return Axis(name, 1, 0, None) if group is None else Axis(name, group.size(), group.rank(), group)


def tensor_axis(module: Any) -> Axis:
    """Return the tensor-parallel axis of a layer, which holds its group."""
    return axis_of(TENSOR, getattr(module, "tp_group", None))


def data_axis(model: nn.Module | None = None) -> Axis:
    """Return the axis over which batches (and, context-parallel, sequences) are divided; gradients are averaged there.

    Megatron's loss functions are scaled so that the average over ranks of one sequence is the gradient of all of it.
    """
    return axis_of(DATA, group_of(model, "dp_cp", "get_data_parallel_group", with_context_parallel=True))


def stage_axis(model: nn.Module | None = None) -> Axis:
    """Return the axis of pipeline stages."""
    return axis_of(STAGES, group_of(model, "pp", "get_pipeline_model_parallel_group"))


def group_of(model: nn.Module | None, name: str, getter: str, **options: Any) -> Any:
    """Return a group: of the collection that the model was given, or else of Megatron's global state."""
    own = getattr(getattr(model, "pg_collection", None), name, None)
    if own is not None:
        return own
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None
    return getattr(state, getter)(**options)


__all__ = ["DATA", "STAGES", "TENSOR", "axis_of", "data_axis", "group_of", "stage_axis", "tensor_axis"]
