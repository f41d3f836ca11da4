"""Models as Megatron's users hold them: one module, a list of pipeline chunks, or either in wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Classes that stand around a model and hold it as ``module``: torch's and Megatron's.
_WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "Float16Module"})


def chunks_of(model: nn.Module | list[Any]) -> list[Any]:
    """Return the chunks of a model, out of their wrappers.

    Args:
        model: a model, or the list of a pipeline stage's chunks.
    """
    return [_unwrapped(chunk) for chunk in (model if isinstance(model, list) else [model])]


def as_one(chunks: list[Any]) -> Any:
    """Return the chunks of a pipeline stage as one module."""
    return chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)


def _unwrapped(model: nn.Module) -> nn.Module:
    while _WRAPPERS.intersection(cls.__name__ for cls in type(model).__mro__):
        model = model.get_submodule("module")
    return model
