"""Mixtures of experts: the same ranks, divided another way.

What dense layers see as ``tp × cp × dp`` experts see as ``etp × ep × edp``: their own tensor parallelism, ranks with
other experts, and ranks with the same ones. Every token of a step is seen once by each expert that it is routed to, on
whichever rank of ``edp`` it is; with more tensor-parallel ranks than there are in ``etp × ep``, ranks of ``edp`` see
parts of one sequence. So a gradient is the sum over ``edp``, divided by the number of batches of the step, the size of
``dp × cp``: Megatron's own rule. Lepikhin et al. 2020 (expert parallelism).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorica.engines.megatron.groups import data_axis, group_of
from lorica.engines.site import Axis
from lorica.engines.stages import EXPERTS
from lorica.layout import Layout

#: The mesh axes of experts: tensor and data.
EXPERT_TENSOR, EXPERT_DATA = "etp", "edp"

#: What routes tokens to experts.
ROUTER = "megatron.core.transformer.moe.router.Router"


def is_expert(module: Any) -> bool:
    """Whether a linear layer is one of a routed expert's; shared experts are dense layers."""
    return bool(getattr(module, "is_expert", False))


def expert_tensor_axis(module: Any) -> Axis:
    """Return the tensor-parallel axis of an expert's layer, which holds its group."""
    return Axis.of_group(EXPERT_TENSOR, getattr(module, "tp_group", None))


def expert_axes(module: Any) -> dict[str, Axis]:
    """Return the axes of an expert's layer besides the tensor-parallel one."""
    data = Axis.of_group(EXPERT_DATA, group_of(module, "expt_dp", "get_expert_data_parallel_group"))
    others = experts_axis(module)
    return {data.name: data, others.name: others}


def experts_axis(module: Any) -> Axis:
    """Return the axis of ranks with other experts, of a layer of one or of the block of those here, which holds its
    group."""
    own = getattr(module, "ep_group", None)
    return Axis.of_group(EXPERTS, group_of(module, "ep", "get_expert_model_parallel_group") if own is None else own)


def as_expert(module: Any, layout: Layout) -> Layout:
    """Return the layout of a layer of an expert: what is known of it besides its cuts."""
    return replace(layout, sequence=(EXPERT_DATA,), data=(), batches=data_axis(module).size)


__all__ = [
    "EXPERT_DATA",
    "EXPERT_TENSOR",
    "ROUTER",
    "as_expert",
    "expert_axes",
    "expert_tensor_axis",
    "experts_axis",
    "is_expert",
]
