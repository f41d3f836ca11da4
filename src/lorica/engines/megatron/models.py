"""Which modules are Megatron-Core's, the chunks of a model that a rank has, and layers out of their adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.engines.registry import qualified_names


def is_megatron(module: nn.Module) -> bool:
    """Whether a module is of a class of Megatron-Core's, or derived from one."""
    cls = type(module)
    if cls not in _OURS:
        _OURS[cls] = any(name.startswith("megatron.core.") for name in qualified_names(cls))
    return _OURS[cls]


_OURS: dict[type, bool] = {}


def chunks_of(model: nn.Module) -> list[nn.Module]:
    """Return the chunks that a rank has of a model: itself, or the members of a list of chunks; none of others'."""
    if isinstance(model, nn.ModuleList):
        return [chunk for chunk in model if is_megatron(chunk)]
    return [model] if is_megatron(model) else []


def inside_adapters(layer: Any) -> Any:
    """Return a layer inside whatever adapters stand around it; what is no module is returned as it is."""
    while isinstance(layer, nn.Module) and "base_layer" in layer._modules:
        layer = layer._modules["base_layer"]
    return layer


__all__ = ["chunks_of", "inside_adapters", "is_megatron"]
