"""Several linear layers fused into one weight, each with factors of its own (I7: fusing and going back are exact).

The parts' A's lie one below the other, ``[P·r, in]``. A row of the weight belongs to one part, so B stays ``[out, r]``;
spread over the columns of its part it is the B of the fused weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.engines.describe import Engines
from lorica.engines.registry import described, layout_of
from lorica.engines.site import Site
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.layout import Layout, Roles
from lorica.layout.layout import At
from lorica.ops.base import FactorShapes, Host
from lorica.ops.linear import Linear, Product


class FusedLinear(Linear):
    """A layer whose layout names parts (``qkv_proj`` of ``q_proj``, ``k_proj`` and ``v_proj``)."""

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[P·r, in]``, B ``[out, r]``."""
        layout = _layout(base)
        sizes = layout.sizes
        return FactorShapes(torch.Size((len(layout.parts) * r, sizes["in"])), torch.Size((sizes["out"], r)))

    def parts(self, base: Any) -> list[tuple[str, int, int]]:
        """The layout's."""
        return _layout(base).part_bounds()

    def add(
        self, y: Tensor, x: Tensor, layer: Host, factors: Factors, spec: AdapterSpec, product: Product = F.linear
    ) -> Tensor:
        """Add the parts of all projections in one product."""
        return super().add(y, x, layer, spread(factors, layer.base_layer), spec, product)

    def matrices(self, layer: Host, factors: Factors) -> tuple[Tensor, Tensor]:
        """A, and B spread over the parts' columns."""
        return super().matrices(layer, spread(factors, layer.base_layer))

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``B, A`` with B spread over the parts' columns."""
        return super().delta(base, spread(factors, base))

    def windows(
        self, path: str, factor: str, spec: AdapterSpec, base: Any, shape: torch.Size, roles: Roles
    ) -> list[tuple[str, tuple[slice, ...] | None]]:
        """Each part under its own name beside the fused layer, as if the projections had never been fused."""
        parent = path.rpartition(".")[0]
        rest = tuple(slice(0, size) for size in shape[1:])
        layout = _layout(base)
        each = shape[0] // len(layout.parts)
        found: list[tuple[str, tuple[slice, ...] | None]] = []
        for index, (name, first, last) in enumerate(layout.part_bounds()):
            rows = slice(first, last) if roles[0] == "out" else slice(index * each, (index + 1) * each)
            if not spec.parts or name in spec.parts:
                found.append((f"{parent}.{name}.{factor}", (rows, *rest)))
        return found


class OneLinear(Linear):
    """Projections that are fused in one weight, with one pair of factors (``fused_as_one``).

    Rows of B are in the logical order: all of the first part, then all of the second.
    """

    def place(self, engines: Engines, name: str, base: nn.Module) -> Site | None:
        """Return where the layer lies, its parts made one."""
        site = super().place(engines, name, base)
        return None if site is None else replace(site, layout=site.layout.as_one(), across=_as_one(site.across))


class NotFused(Linear):
    """Projections in one layer of which the parts are not known: refused.

    Args:
        needs: where such a layer is adapted, as its engine says it.
    """

    def __init__(self, needs: str) -> None:
        super().__init__()
        self._needs = needs

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:
        """Refuse."""
        raise TargetError(f"{where}: a {type(base).__name__} is adapted where {self._needs}")


def _as_one(site: Site | None) -> Site | None:
    return None if site is None else replace(site, layout=site.layout.as_one())


def spread(factors: Factors, base: Any) -> Factors:
    """Return the factors of the fused weight: A as it is, B ``[out, P·r]`` with each row in its part's columns.

    Args:
        factors: this rank's.
        base: the base layer.
    """
    found = described(base)
    assert found is not None
    return spread_by(factors, found.layout, found.at)


def spread_by(factors: Factors, layout: Layout, at: At) -> Factors:
    """Return the same for the rank ``at`` of a layout."""
    r, parts = factors.b.shape[1], len(layout.parts)
    rows = sorted((start, stop, part) for part, held in enumerate(layout.part_rows(at)) for start, stop in held)
    pieces = [F.pad(factors.b[start:stop], (part * r, (parts - part - 1) * r)) for start, stop, part in rows]
    return factors._replace(b=torch.cat(pieces))


def part_names(key: str, module: nn.Module) -> list[str]:
    """Return the full names that the projections fused in a module had, or nothing where none are.

    Args:
        key: full name of the module.
        module: it.
    """
    if (layout := layout_of(module)) is None:
        return []
    parent, names = key.rpartition(".")[0], [name for name, _ in layout.parts]
    return [f"{parent}.{name}" if parent else name for name in names]


def _layout(base: nn.Module) -> Layout:
    found = layout_of(base)
    assert found is not None
    return found
