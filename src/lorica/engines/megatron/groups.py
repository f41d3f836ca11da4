"""Megatron-Core's process groups as axes. Shoeybi et al. 2019 (tensor), Narayanan et al. 2021 (pipeline)."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lorica.engines.megatron.models import chunks_of
from lorica.engines.site import Axis

#: The mesh axes that Megatron's groups are: tensor, data (with context parallelism) and pipeline.
TENSOR, DATA, STAGES = "tp", "dp", "pp"


#: Where a layer keeps the groups that its model was given.
_GIVEN = "lorica_groups"


class _Given:
    """The collection of groups of a model; they cannot be copied, and are the same for every copy of it."""

    def __init__(self, collection: Any) -> None:
        self.collection = collection

    def __deepcopy__(self, memo: dict[int, Any]) -> _Given:
        return self


def tensor_axis(module: Any) -> Axis:
    """Return the tensor-parallel axis of a layer, which holds its group."""
    return Axis.of_group(TENSOR, getattr(module, "tp_group", None))


def tell_groups(model: nn.Module) -> None:
    """Tell the layers of a model which groups it was given (``pg_collection``); Megatron's layers hold some of them.

    Args:
        model: the base model, or the list of its chunks.
    """
    for chunk in chunks_of(model):
        collections = (getattr(module, "pg_collection", None) for module in chunk.modules())
        collection = next((found for found in collections if found is not None), None)
        if collection is not None:
            given = _Given(collection)
            for module in chunk.modules():
                module.__dict__[_GIVEN] = given


def data_axis(module: nn.Module) -> Axis:
    """Return the axis over which batches (and, context-parallel, sequences) are divided; gradients are averaged there.

    Megatron's loss functions are scaled so that the average over ranks of one sequence is the gradient of all of it.
    """
    return Axis.of_group(DATA, group_of(module, "dp_cp", "get_data_parallel_group", with_context_parallel=True))


def stage_axis(model: nn.Module) -> Axis:
    """Return the axis of pipeline stages of a model."""
    return Axis.of_group(STAGES, group_of(model, "pp", "get_pipeline_model_parallel_group"))


def group_of(module: nn.Module, name: str, getter: str, **options: Any) -> Any:
    """Return a group: of the collection that the model was given, or else of Megatron's global state.

    Args:
        module: the model, or a layer that was told.
        name: of the group in a collection.
        getter: the function of ``megatron.core.parallel_state`` that returns it.
        **options: of that function.
    """
    given: _Given | None = module.__dict__.get(_GIVEN)
    collection = getattr(module, "pg_collection", None) if given is None else given.collection
    own = getattr(collection, name, None)
    if own is not None:
        return own
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None
    return getattr(state, getter)(**options)


__all__ = ["DATA", "STAGES", "TENSOR", "data_axis", "group_of", "stage_axis", "tell_groups", "tensor_axis"]
