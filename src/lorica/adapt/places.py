"""Where in a model each module stands, and putting another one there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lorica.adapt.found import adapter_modules
from lorica.layers import LoraLayer
from lorica.targets.plan import Target
from lorica.targets.walk import every_module

_BYPASSING = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


class Places:
    """Where in a model each module stands. One module can stand in several places (a shared embedding).

    Attributes:
        bypassing: modules that compute from their children's weights without calling them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots: dict[int, list[tuple[nn.Module, str]]] = {}
        self._owners: dict[int, list[LoraLayer]] = {}
        self.bypassing: list[nn.Module] = []
        slots = self._slots
        for parent in every_module(model):
            if not (children := parent._modules):
                continue
            if isinstance(parent, _BYPASSING):
                self.bypassing.append(parent)
            if isinstance(parent, LoraLayer):
                self._owners.setdefault(id(parent.get_base_layer()), []).append(parent)
            for name, child in children.items():
                key = id(child)
                if key in slots:
                    slots[key].append((parent, name))
                else:
                    slots[key] = [(parent, name)]

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` stood; one of the two stands around the other."""
        slots = self._slots.pop(id(old))
        for parent, name in slots:
            parent._modules[name] = new
        within = [(new, name) for name, child in new._modules.items() if child is old]
        if within:
            self._slots[id(old)] = within
        self._slots[id(new)] = slots

    def layer_at(self, target: Target) -> LoraLayer | None:
        """Return the adapted layer that there is on a target, or None."""
        owners = self._owners.get(id(target.base))
        return next((layer for layer in owners if layer.op is target.op), None) if owners else None

    def stand_around(self, target: Target, make: Callable[[nn.Module], LoraLayer]) -> LoraLayer:
        """Put a new layer around the target's base layer.

        Layers on several parameters of one module stand around one another, the module's last parameter outermost
        (as in PEFT, whose files tell them apart by that).
        """
        inside: nn.Module = target.base
        owners = self._owners.setdefault(id(target.base), [])
        if owners:
            order = [*target.base._parameters]
            for owner in sorted(owners, key=lambda layer: order.index(layer.op.weight_name)):
                if order.index(owner.op.weight_name) <= order.index(target.op.weight_name):
                    inside = owner
        layer = make(inside)
        owners.append(layer)
        self.put(inside, layer)
        return layer


def keep_from_fast_path(places: Places) -> None:
    """Let torch's encoder layers call their children where there are adapters inside.

    In inference they compute from the weights of their children and never call them, unless a hook is attached
    somewhere inside. Without this an adapter would be passed over without a word.
    """
    for module in places.bypassing:
        if _no_fast_path not in module._forward_pre_hooks.values() and any(adapter_modules(module)):
            module.register_forward_pre_hook(_no_fast_path)


def give_back_fast_path(places: Places) -> None:
    """Undo :func:`keep_from_fast_path` where there are none any more."""
    for module in places.bypassing:
        if not any(adapter_modules(module)):
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is _no_fast_path:
                    del module._forward_pre_hooks[key]


def _no_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing; being attached is what counts."""


__all__ = ["Places", "give_back_fast_path", "keep_from_fast_path"]
