"""Taking an adapter out of a model, or all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorica.adapt.found import AdapterModule, adapted, adapters_of, merged_into
from lorica.adapt.places import Places, give_back_fast_path
from lorica.errors import AdapterError
from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer, TrainableTokensWrapper
from lorica.targets.walk import bare


def take_out(model: nn.Module, adapter: str) -> None:
    """Remove an adapter; a layer that has none left gives its place back to the base layer.

    Raises:
        AdapterError: the adapter is merged somewhere. Nothing was changed.
    """
    modules = adapted(model)
    if not modules:
        return
    with modules[0].switch.turns.writing():
        for module in modules:
            if adapter in merged_into(module):
                raise AdapterError(
                    f"{module.target_name}: adapter {adapter!r} is merged; unmerge it before deleting it"
                )
        for module in modules:
            module.remove_adapter(adapter)
        if left := [module for module in modules if not adapters_of(module)]:
            _give_places_back(model, left, ())


def unload(model: nn.Module, merged: Sequence[str]) -> None:
    """Give every base layer its place back.

    Args:
        merged: adapters whose copies of whole modules take the place of the originals.
    """
    _give_places_back(model, adapted(model), merged)


def _give_places_back(model: nn.Module, modules: Sequence[AdapterModule], merged: Sequence[str]) -> None:
    places = Places(model)
    for module in reversed(modules):
        plain = _under(module)
        _leave(module)
        if isinstance(module, ModulesToSaveWrapper):
            copies = [module.modules_to_save[name] for name in merged if name in module.modules_to_save]
            plain = copies[0] if copies else plain
        places.put(module, plain)
    give_back_fast_path(places)


def _under(module: AdapterModule) -> nn.Module:
    """Return what an adapted module stands around: the base layer, or a layer on another of its parameters."""
    return bare(module) if isinstance(module, ModulesToSaveWrapper) else _writes(module).base_layer


def _leave(module: AdapterModule) -> None:
    if not isinstance(module, ModulesToSaveWrapper):
        _writes(module).leave()


def _writes(module: LoraLayer | TrainableTokensWrapper) -> LoraLayer | TrainableTokensLayer:
    """Return what merges into the weight."""
    return module.token_adapter if isinstance(module, TrainableTokensWrapper) else module


__all__ = ["take_out", "unload"]
