"""Which names are meant: "all-linear", and what an architecture has by default."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.config import LoraConfig, TaskType
from lorica.errors import TargetError, suggest
from lorica.targets.defaults import DEFAULT_TARGETS
from lorica.targets.match import Names, shortest_names
from lorica.targets.walk import bare, op_at


def resolve_names(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> Names:
    """Return the target names with "all-linear" and the architecture's defaults filled in.

    Raises:
        TargetError: the configuration names none and the architecture is not known.
    """
    names = config.target_modules
    if names is None:
        model_type = config_of(model).get("model_type")
        if model_type not in DEFAULT_TARGETS and config.target_parameters:
            return set()
        if model_type not in DEFAULT_TARGETS:
            raise TargetError(
                "Please specify `target_modules` or `target_parameters` in `peft_config`: there is no default for "
                f"model type {model_type!r}.{suggest(str(model_type), DEFAULT_TARGETS)}"
            )
        default = DEFAULT_TARGETS[model_type]
        return default if isinstance(default, str) else set(default)
    if isinstance(names, str) and names.lower() == "all-linear":
        return _all_linear(model, modules, config)
    return names


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the model's configuration as a dictionary; an empty one where it has none."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    return dict(config) if isinstance(config, dict) else dict(vars(config))


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> set[str]:
    linear = {name for name, module in modules.items() if getattr(op_at(module), "kind", None) == "Linear"}
    inside_attention = {
        name for name in linear if isinstance(bare(modules[name.rpartition(".")[0]]), nn.MultiheadAttention)
    }
    output = _output_layer(model, config)
    chosen = {name for name in linear - inside_attention if modules[name] is not output}
    return shortest_names(chosen, modules.keys() - chosen)


def _output_layer(model: nn.Module, config: LoraConfig) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    output: nn.Module | None = get() if get is not None else None
    if output is None and config.task_type == TaskType.SEQ_CLS:
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        output = next((head for head in heads if head is not None), None)
    return output


__all__ = ["config_of", "resolve_names"]
