"""Walking an adapted model without its adapters, so that the way is as long however many there are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper


def live_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the base model and every adapted layer with its live name, in the order of the model.

    Of what an adapted layer has inside only the base layer is walked, no factors and no copies. A module that stands in
    several places is yielded once, under its first name.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""
            stack += [(prefix + key, child) for key, child in reversed(_inside(module)) if child is not None]


def _inside(module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    children = module._modules
    if isinstance(module, LoraLayer):
        return [("base_layer", children["base_layer"])]
    if isinstance(module, ModulesToSaveWrapper):
        return [("original_module", children["original_module"])]
    if isinstance(module, TrainableTokensWrapper):
        return [("token_adapter.base_layer", module.original_module)]
    return [*children.items()]


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the base model."""
    seen: set[int] = set()
    found: dict[int, nn.Parameter] = {}
    stack: list[nn.Module] = [model]
    while stack:  # as live_modules goes, without names
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.update((id(parameter), parameter) for parameter in module._parameters.values() if parameter is not None)
        if module._modules:
            stack += [child for _, child in reversed(_inside(module)) if child is not None]
    return [*found.values()]
