"""Pipeline stages: which layers another rank has."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.engines.native.pipeline import Elsewhere
from lorica.engines.registry import ENGINES
from lorica.engines.site import Axis

#: Name of the mesh axis of pipeline stages, which hold different layers.
STAGES = "pp"
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
