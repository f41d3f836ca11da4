"""The places of an adapted layer in its engine's forward: inside the base layer's collectives, or across them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.engines.site import Site
from lorica.init import Factors
from lorica.variants import VARIANTS

if TYPE_CHECKING:
    from lorica.layers.layer import LoraLayer


class Across:
    """An adapted layer, as an op or a variant sees it where parts are added across the base layer's collectives."""

    def __init__(self, layer: LoraLayer, site: Site) -> None:
        self._layer = layer
        self.site: Site | None = site

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def add(self, y: Tensor, x: Tensor, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return the output with one adapter's part; both are this rank's."""
        return VARIANTS[spec.variant].add(y, x, self, factors, spec)

    def in_forward(self, factors: Factors, spec: AdapterSpec) -> Factors:
        """Return the factors of plain LoRA that an adapter amounts to in this forward."""
        return VARIANTS[spec.variant].in_forward(self, factors, spec)


def places(site: Site | None) -> Iterator[Any]:
    """Yield a layer's sites that have an opening."""
    if site is not None:
        yield from (place for place in (site, site.across) if place is not None and place.opening is not None)


__all__ = ["Across", "places"]
