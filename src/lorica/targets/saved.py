"""Which modules train fully beside the factors (``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorica.config import LoraConfig, TaskType
from lorica.engines import fsdp
from lorica.engines.names import submodule
from lorica.engines.stages import is_elsewhere
from lorica.errors import LayoutError, TargetError, suggest
from lorica.layers import LoraLayer, TrainableTokensWrapper
from lorica.storage import Packed, kind_of, stored_weight
from lorica.targets.explain import endings
from lorica.targets.walk import bare

#: Heads that a task trains fully; a model has one of them.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def saved_modules(config: LoraConfig, modules: dict[str, nn.Module], *, staged: bool) -> list[str]:
    wanted = tuple(config.modules_to_save or ())
    if not wanted:
        return []
    # Without a dot, as PEFT has it: "norm" means "input_layernorm" too. Files name what was saved, so both must agree.
    named = [key for key in modules if key.endswith(wanted)]
    heads = {head for heads in TASK_HEADS.values() for head in heads}
    for name in wanted:
        if name not in heads and not staged and not any(key.endswith(name) for key in named):
            raise TargetError(f"modules_to_save: no module is named {name!r}.{suggest(name, endings(modules))}")
    found = [key for key in named if not is_elsewhere(modules[key])]
    for key in found:
        if isinstance(modules[key], (*_CONTAINERS, LoraLayer, TrainableTokensWrapper)):
            raise TargetError(
                f"{key}: modules_to_save cannot be applied to modules of type {type(modules[key])}; name modules that "
                "have a forward and that no adapter is on"
            )
        _refuse_quantised(key, bare(modules[key]))
    return found


def _refuse_quantised(key: str, module: nn.Module) -> None:
    """Numbers that stand for a weight in another form cannot be trained."""
    for inner in module.modules():
        names = [name for name, parameter in inner._parameters.items() if parameter is not None]
        if kind_of(type(inner)) or any(isinstance(stored_weight(inner, name), Packed) for name in names):
            raise TargetError(
                f"{key}: modules_to_save trains a whole module, and this one's weights are quantised "
                f"({type(inner).__name__}); adapt it with target_modules, or load it without quantisation"
            )


def check_copies(model: nn.Module, saved: Iterable[str]) -> None:
    saved = list(saved)
    sharded = fsdp.managed(model) if saved else set()
    for name in saved:
        if any(id(parameter) in sharded for parameter in submodule(model, name).parameters()):
            raise LayoutError(
                f"{name}: modules_to_save trains a copy, and what fully_shard manages cannot be copied; add the "
                "adapter first and call fully_shard then"
            )


__all__ = ["TASK_HEADS", "check_copies", "saved_modules"]
