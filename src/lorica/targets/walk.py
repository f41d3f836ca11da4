"""Walking a model by the names its modules had before anything was adapted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper

_FACTOR = re.compile(r"^(?P<target>.+)\.(?:lora_[AB]\.(?:weight|bias)|lora_embedding_[AB])$")


def targets_of_keys(keys: Iterable[str]) -> set[str]:
    """Return the full names of the modules that the factors under these names in a file belong to."""
    found = filter(None, map(_FACTOR.match, keys))
    return {factor["target"].removeprefix("base_model.model.") for factor in found}


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its name in the base model.

    An adapted layer is yielded as it is, its inside is not.

    A module that stands in several places is yielded once, under its first name.
    """
    yield from _walk(model, "", set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    if isinstance(module, LoraLayer | ModulesToSaveWrapper | TrainableTokensWrapper):
        return
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def bare(module: nn.Module) -> nn.Module:
    """Return the module that was there before it was adapted."""
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.bare
    if isinstance(module, LoraLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def tied_with_embedding(model: nn.Module) -> tuple[str, list[str]] | None:
    """Return the input embedding's name and the names of the modules that share its weight; None if none does."""
    modules = list(base_modules(model))
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return None
    try:
        embedding = get()
    except NotImplementedError:
        return None
    weight = getattr(bare(embedding), "weight", None) if isinstance(embedding, nn.Module) else None
    if weight is None:
        return None
    sharing = [name for name, module in modules if getattr(bare(module), "_parameters", {}).get("weight") is weight]
    source = next((name for name in sharing if bare(dict(modules)[name]) is bare(embedding)), None)
    others = [name for name in sharing if name != source]
    return (source, others) if source is not None and others else None
