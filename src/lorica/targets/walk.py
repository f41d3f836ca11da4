"""Walking a model by the names its modules had before anything was adapted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lorica.engines.names import below, children_of
from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper
from lorica.ops import Op, op_of

_ADAPTED = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)

_FACTOR = re.compile(r"^(?P<target>.+)\.(?:lora_[AB]\.(?:weight|bias)|lora_embedding_[AB])$")


def targets_of_keys(keys: Iterable[str]) -> set[str]:
    """Return the full names of the modules that the factors under these names in a file belong to."""
    found = filter(None, map(_FACTOR.match, keys))
    return {factor["target"].removeprefix("base_model.model.") for factor in found}


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its logical name in the base model.

    An adapted layer is yielded as it is, its inside is not.

    A module that stands in several places is yielded once, under its first name.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module | None]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if module._modules and not isinstance(module, _ADAPTED):
            stack += [(below(name, child), inner) for child, inner in reversed([*children_of(module)])]


def every_module(model: nn.Module) -> list[nn.Module]:
    """Return every module of the model once, those inside adapted layers too, but for those that hold factors."""
    seen: set[int] = set()
    found: list[nn.Module] = []
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        found.append(module)
        if isinstance(module, LoraLayer):
            stack.append(module._modules["base_layer"])
        elif module._modules:
            stack += reversed(module._modules.values())
    return found


def bare(module: nn.Module) -> nn.Module:
    """Return the module that was there before it was adapted."""
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.bare
    if isinstance(module, LoraLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def op_at(module: nn.Module) -> Op | None:
    """Return the op of a module, adapted or not; None where it cannot be adapted."""
    if isinstance(module, TrainableTokensWrapper):
        return op_at(module.original_module)
    return module.op if isinstance(module, LoraLayer) else op_of(module)


def tied_with_embedding(
    model: nn.Module, modules: Mapping[str, nn.Module] | None = None
) -> tuple[str, list[str]] | None:
    """Return the input embedding's name and the names of the modules that share its weight; None if none does.

    Args:
        model: the base model.
        modules: what :func:`base_modules` yields of it, if that is known.
    """
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
    found = base_modules(model) if modules is None else modules.items()
    sharing = [(name, plain) for name, plain in _bare_ones(found) if plain._parameters.get("weight") is weight]
    source = next((name for name, plain in sharing if plain is bare(embedding)), None)
    others = [name for name, _ in sharing if name != source]
    return (source, others) if source is not None and others else None


def _bare_ones(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in modules:
        yield name, bare(module) if isinstance(module, _ADAPTED) else module
