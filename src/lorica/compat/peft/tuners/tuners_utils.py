"""peft.tuners.tuners_utils: what a tuner and its layers answer, and which modules a configuration names."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lorica.adapt import inject, trainable
from lorica.config import LoraConfig
from lorica.config.checks import factor_dtype
from lorica.errors import AdapterError
from lorica.layers import LoraLayer, Switch
from lorica.model import LoraModel
from lorica.targets.match import excluded, selected


class BaseTuner(nn.Module, ABC):
    """What holds the adapters of a model. There is one, :class:`lorica.LoraModel`, which is an instance."""

    prefix: ClassVar[str] = "lora_"
    uses_shared_state: ClassVar[bool] = False

    @staticmethod
    def _check_target_module_exists(peft_config: LoraConfig, key: str) -> bool:
        return check_target_module_exists(peft_config, key)


class BaseTunerLayer(nn.Module, ABC):
    """What an adapted layer answers besides :class:`lorica.layers.LoraLayer`'s own methods.

    All layers of a model share one switch, so that activating or disabling adapters through one layer does so in all.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    # What the module that this class is mixed into has.
    switch: Switch
    merged_adapters: list[str]
    target_name: str

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters of the model."""
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """Names of the active adapters of the model."""
        return list(self.switch.active)

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters of the model on or off."""
        with self.switch.turns.writing():
            self.switch.enabled = enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make the named adapters the active ones of the model; this layer's parameters of them train.

        Args:
            adapter_names: one name or several.
            inference_mode: freeze them.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        with self.switch.turns.writing():
            self.switch.active = names
            for name in self._get_available_adapters():
                self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let this layer's parameters of the named adapters train, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = self._get_available_adapters()
        trainable.set_requires_grad(self, [name for name in names if name in known], requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If none is active then, the first of this layer's others becomes active, with a warning.

        Raises:
            AdapterError: it is merged into the base weight.
        """
        self._forget(adapter_name)
        if adapter_name not in self.switch.active:
            return
        left = [name for name in self.switch.active if name != adapter_name]
        others = sorted(self._get_available_adapters())
        if not left and others:
            left = others[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                stacklevel=3,
            )
        self.set_adapter(left)

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._get_available_adapters())

    def _forget(self, adapter_name: str) -> None:
        raise NotImplementedError


BaseTuner.register(LoraModel)
BaseTunerLayer.register(LoraLayer)


def check_target_module_exists(config: LoraConfig, key: str) -> bool:
    """Whether a configuration means the module ``key``.

    Args:
        config: the configuration.
        key: full name of a module.
    """
    return not excluded(config, key) and selected(config, config.target_modules, key)


def inspect_matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return the names of a model's modules that an adapter's configuration means, and of those that it does not.

    Args:
        tuner: what holds the adapters (``model.base_model``).
        adapter_name: whose configuration.
    """
    configs: Any = tuner.peft_config
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in inject.base_of(tuner).named_modules():
        matched = check_target_module_exists(configs[adapter_name], key)
        found["matched" if matched else "unmatched"].append(key)
    return found


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type = BaseTunerLayer,
) -> None:
    """Make adapters of a model active, in place; the others rest and do not train.

    Args:
        model: an adapted model, wrapped or not.
        adapter_name: one name or several.
        inference_mode: freeze them.
        layer_cls: accepted; there is one class of layers.
    """
    del layer_cls
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    with (inject.switch_of(model) or Switch()).turns.writing():
        _unmerge_with_warning(model)
        for _, module in inject.adapter_modules(model):
            module.switch.active = names
            for name in inject.adapters_of(module):
                trainable.set_requires_grad(module, name, name in names and not inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter from a model that has no wrapper; its configuration stays.

    Args:
        model: an adapted model.
        adapter_name: the adapter's name.
        prefix: accepted; it is always ``"lora_"``.
        layer_cls: accepted; there is one class of layers.

    Returns:
        The adapters that are active then; None where there is none left.

    Raises:
        AdapterError: the adapter is merged somewhere. Nothing was changed.
    """
    del prefix, layer_cls
    modules = [module for _, module in inject.adapter_modules(model)]
    if not modules:
        return None
    switch = modules[0].switch
    with switch.turns.writing():
        refuse_merged(model, [adapter_name])
        for module in modules:
            module.remove_adapter(adapter_name)
        left = [name for name in switch.active if name != adapter_name]
        if not left and adapter_name in switch.active:
            others = sorted({name for module in modules for name in inject.adapters_of(module)})
            left = others[:1]
            if left:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                    stacklevel=2,
                )
        set_adapter(model, left)
        return left or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let the parameters of the named adapters of a model train, or freeze them."""
    trainable.set_requires_grad(model, adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widen the 16-bit parameters of an adapter to float32.

    Args:
        model: an adapted model.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: without it, nothing is done.
    """
    configs: dict[str, LoraConfig] = getattr(model, "peft_config", None) or {}
    if not autocast_adapter_dtype or (adapter_name in configs and factor_dtype(configs[adapter_name]) is not None):
        return
    for parameter in inject.adapter_parameters(model, adapter_name):
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def refuse_merged(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to delete adapters that are merged.

    Raises:
        AdapterError: one of them is.
    """
    merged = {name for layer in inject.lora_layers(model) for name in layer.merged_adapters}
    if still := sorted(set(names) & merged):
        raise AdapterError(f"Cannot delete adapter(s) {still} while they are merged. Please unmerge them first.")


def _unmerge_with_warning(model: nn.Module) -> None:
    merged = [layer for layer in inject.lora_layers(model) if layer.merged]
    if merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
    for layer in merged:
        layer.unmerge()


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_target_module_exists",
    "delete_adapter",
    "inspect_matched_modules",
    "set_adapter",
    "set_requires_grad",
]
