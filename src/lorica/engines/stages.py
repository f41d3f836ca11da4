"""Layers that only other ranks have: those of their pipeline stage, and experts that are modules."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from lorica.engines.native.pipeline import Elsewhere
from lorica.engines.registry import ENGINES, described
from lorica.engines.site import Axis

#: Name of the mesh axis of pipeline stages, which hold different layers.
STAGES = "pp"
#: Name of the axis of ranks whose routed experts, each a module with a name of its own, are different ones.
EXPERTS = "experts"
#: What stands for a module of another stage in the models of transformers.
_THEIRS = "transformers.distributed.pipeline_parallel.PipelineIdentityLayer"


def is_elsewhere(module: nn.Module) -> bool:
    """Whether a module only stands for one that another stage has."""
    cls = type(module)
    if cls not in _ELSEWHERE:
        _ELSEWHERE[cls] = issubclass(cls, Elsewhere) or f"{cls.__module__}.{cls.__qualname__}" == _THEIRS
    return _ELSEWHERE[cls]


_ELSEWHERE: dict[type, bool] = {}


def axis_of_stages(model: Any) -> Axis | None:
    """Return the axis of a model's stages, if it has more than one."""
    found = next(filter(None, (engine.stages(model) for engine in ENGINES)), None)
    theirs = getattr(model, "_pp_stage", None)
    if found is None and theirs is not None:
        found = Axis(STAGES, theirs.pp_size, theirs.pp_rank, theirs.pp_group)
    return found if found is not None and found.size > 1 else None


def has_others(model: nn.Module) -> bool:
    """Whether other ranks have layers under names that are not here."""
    if axis_of_stages(model) is not None:
        return True
    if not dist.is_available() or not dist.is_initialized():
        return False  # no group has two members; a walk over the model takes a twentieth of an injection
    found = (described(module) for module in model.modules())
    return any(EXPERTS in one.axes and one.axes[EXPERTS].size > 1 for one in found if one is not None)
