"""Numbers of layers and experts in the whole model, and what lies on other ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from lorica.engines.megatron.experts import experts_axis
from lorica.engines.megatron.models import chunks_of, is_megatron
from lorica.engines.names import children_of, renumber
from lorica.engines.registry import qualified_names

_EXPERTS = {f"megatron.core.transformer.moe.experts.{name}" for name in ("SequentialMLP", "GroupedMLP", "TEGroupedMLP")}
#: What only the first stage of a pipeline has, or only the last one.
_ENDS = (
    "embedding",
    "output_layer",
    *(f"{block}.{norm}" for block in ("decoder", "encoder") for norm in ("final_layernorm", "final_norm")),
    *("lm_head", "pooler", "binary_head"),  # of BERT and T5
)
#: A numbered level of a logical name: of layers (the first there is) or of experts.
_NUMBERED = re.compile(r"(?:^|\.)(?P<list>layers|local_experts)\.(?P<number>\d+)(?=\.|$)")


def number_globally(model: nn.Module) -> None:
    """Note the numbers that layers and experts have in the whole model; a list of chunks is no level of names."""
    if chunks_of(model) and isinstance(model, nn.ModuleList):
        renumber(model, model, dict.fromkeys(model._modules, ""))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            numbers = {name: _number_of(layer) for name, layer in module._modules.items()}
            if any(numbers.values()):
                renumber(model, module, {name: str(number - 1) for name, number in numbers.items() if number})
        elif is_megatron(module) and not _EXPERTS.isdisjoint(qualified_names(type(module))):
            _number_experts(model, module)


def _number_of(layer: Any) -> int:
    """Return the number that a layer has in the whole model, from 1; 0 where it has none."""
    return int(getattr(layer, "layer_number", 0)) if is_megatron(layer) else 0


def _number_experts(model: nn.Module, block: Any) -> None:
    experts, first = block.local_experts, experts_axis(block).rank * block.num_local_experts
    renumber(model, experts, {name: str(first + int(name)) for name in experts._modules})


def lies_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether what has a logical name is on another pipeline stage, or among another rank's experts.

    Args:
        model: the base model, or the list of its chunks.
        name: of a tensor or of a module.
    """
    chunks: list[Any] = chunks_of(model)
    config = getattr(chunks[0], "config", None) if chunks else None
    if config is None:
        return False
    end = next((end for end in _ENDS if f"{name}.".startswith(f"{end}.")), None)
    if end is not None and getattr(config, "pipeline_model_parallel_size", 1) > 1:
        return next(_there(model, end.split(".")), None) is None
    counts = {"layers": getattr(config, "num_layers", 0), "local_experts": getattr(config, "num_moe_experts", 0) or 0}
    for found in _NUMBERED.finditer(name):
        if next(_there(model, name[: found.end()].split(".")), None) is None:
            return int(found["number"]) < counts[found["list"]]
    return False


def _there(module: nn.Module, parts: list[str]) -> Iterator[nn.Module]:
    """Yield the modules here that some parts of a logical name lead to."""
    if not parts:
        yield module
        return
    for name, child in children_of(module):
        if child is not None and name in ("", parts[0]):
            yield from _there(child, parts[1:] if name else parts)


__all__ = ["lies_elsewhere", "number_globally"]
