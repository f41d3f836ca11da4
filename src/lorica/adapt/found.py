"""What of a model is adapted. Nothing is remembered from one question to the next: a walk over the model takes less
time than the smallest change of it, and can never be out of date."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lorica.layers import LoraLayer, ModulesToSaveWrapper, Switch, TrainableTokensLayer, TrainableTokensWrapper

AdapterModule = LoraLayer | ModulesToSaveWrapper | TrainableTokensWrapper

_KINDS = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Yield the live name and the module of every adapted layer and every module that is saved whole.

    The order is that of ``named_modules``; the insides of what is yielded are not walked, which is most of the model.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module | None]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, _KINDS):
            yield name, module
            children = _inside(module)
        else:
            children = module._modules
        if children:
            prefix = f"{name}." if name else ""
            stack += [(prefix + child_name, child) for child_name, child in reversed(children.items())]


def adapted(model: nn.Module) -> list[AdapterModule]:
    """Return the modules that :func:`adapter_modules` yields; no name is made up for it."""
    return list(_without_names(model))


def _without_names(model: nn.Module) -> Iterator[AdapterModule]:
    seen: set[int] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or not (children := module._modules) or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, _KINDS):
            yield module
            if inside := _inside(module):
                stack += reversed(inside.values())
        else:
            stack += reversed(children.values())


_NOTHING: dict[str, nn.Module | None] = {}


def _inside(module: AdapterModule) -> dict[str, nn.Module | None]:
    """Return those modules inside an adapted one that may be adapted too, by their names below it."""
    if isinstance(module, LoraLayer):
        base: nn.Module = module._modules["base_layer"]  # type: ignore[assignment]
        if not base._modules:
            return _NOTHING
        if isinstance(base, LoraLayer):
            return {"base_layer": base}
        return {f"base_layer.{name}": base._modules[name] for name in module.op.children}
    if isinstance(module, TrainableTokensWrapper) and isinstance(module.original_module, LoraLayer):
        return {"token_adapter.base_layer": module.original_module}
    return _NOTHING


def tuner_of(model: nn.Module) -> nn.Module | None:
    """Return the ``LoraModel`` that ``model`` is or wraps; None for a model that was adapted without a wrapper."""
    for candidate in (model, model._modules.get("base_model")):
        if getattr(type(candidate), "holds_adapters", False):
            return candidate
    return None


def base_of(model: nn.Module) -> nn.Module:
    """Return the base model inside a ``PeftModel`` or ``LoraModel``, or the model itself."""
    tuner = tuner_of(model)
    return model if tuner is None else tuner.get_submodule("model")


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return every adapted layer of ``model``, in its order."""
    return [module for module in adapted(model) if isinstance(module, LoraLayer)]


def token_layers(model: nn.Module) -> list[TrainableTokensLayer]:
    """Return every layer of ``model`` of which rows train, in its order; those with rows of their own first."""
    return tokens_among(adapted(model))


def tokens_among(modules: Iterable[AdapterModule]) -> list[TrainableTokensLayer]:
    """Return the layers of which rows train; those with rows of their own first."""
    found = [module.token_adapter for module in modules if isinstance(module, TrainableTokensWrapper)]
    return sorted(found, key=lambda layer: layer.tied_adapter is not None)


def switch_of(model: nn.Module) -> Switch | None:
    """Return the switch that the layers of an adapted model share."""
    return next((module.switch for module in _without_names(model)), None)


def adapters_of(module: AdapterModule) -> list[str]:
    """Return the names of the adapters that an adapted module has."""
    if isinstance(module, TrainableTokensWrapper):
        return list(module.token_adapter.token_indices)
    return list(module.specs if isinstance(module, LoraLayer) else module.modules_to_save)


def merged_into(module: AdapterModule) -> list[str]:
    """Return the names of the adapters that are merged into the weight of an adapted module."""
    if isinstance(module, LoraLayer):
        return module.merged_adapters
    return module.token_adapter.merged_adapters if isinstance(module, TrainableTokensWrapper) else []


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yield the parameters that belong to one adapter: its factors and its copies of whole modules."""
    for _, module in adapter_modules(model):
        yield from parameters_of(module, adapter)


def parameters_of(module: AdapterModule, adapter: str) -> Iterable[nn.Parameter]:
    """Return the parameters that an adapted module holds for one adapter."""
    if isinstance(module, LoraLayer):
        return [parameter for _, parameter in module.own_parameters(adapter) if parameter is not None]
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[adapter].parameters() if adapter in module.modules_to_save else ()
    layer = module.token_adapter
    mine = adapter in layer.token_indices and layer.tied_adapter is None
    return (layer.trainable_tokens_delta[adapter],) if mine else ()


__all__ = [
    "AdapterModule",
    "adapted",
    "adapter_modules",
    "adapter_parameters",
    "adapters_of",
    "base_of",
    "lora_layers",
    "merged_into",
    "parameters_of",
    "switch_of",
    "token_layers",
    "tokens_among",
    "tuner_of",
]
