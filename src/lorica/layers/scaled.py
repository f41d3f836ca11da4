"""How strong the adapters of a layer are: scales, and what else is asked of a layer by the names that PEFT has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from lorica.errors import AdapterError
from lorica.layers.merging import Merging


class Scaled(Merging):
    """The part of an adapted layer that sets and tells the scales of its adapters."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to ``scale`` times what its rank and alpha give.

        Raises:
            AdapterError: the adapter is merged with its present scale.
        """
        if adapter in self.specs:
            self._rescale(adapter, scale * self.specs[adapter].natural_scaling)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter by ``scale``."""
        for adapter in self.switch.active:
            if adapter in self.specs:
                self._rescale(adapter, scale * self.specs[adapter].scaling)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter by ``scale``; without one, set it back to what it was."""
        for adapter in self.switch.active:
            if adapter in self.specs:
                spec = self.specs[adapter]
                self._rescale(adapter, spec.natural_scaling if scale is None else spec.scaling / scale)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters of the model."""
        return list(self.switch.active)

    @property
    def disable_adapters(self) -> bool:
        """Whether the model's adapters are turned off."""
        return not self.switch.enabled

    @property
    def r(self) -> Mapping[str, int]:
        """The rank of each adapter."""
        return MappingProxyType({name: spec.r for name, spec in self.specs.items()})

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        """The α of each adapter."""
        return MappingProxyType({name: spec.alpha for name, spec in self.specs.items()})

    @property
    def scaling(self) -> Mapping[str, float]:
        """The scale ``s`` of each adapter; :meth:`set_scale` changes it."""
        return MappingProxyType({name: spec.scaling for name, spec in self.specs.items()})

    def _rescale(self, adapter: str, scaling: float) -> None:
        if adapter in self.merged_adapters:
            raise AdapterError(f"{self.target_name}: adapter {adapter!r} is merged; unmerge it before scaling it")
        self.specs[adapter] = replace(self.specs[adapter], scaling=scaling)


__all__ = ["Scaled"]
