"""Batches whose rows have different adapters: the base layer once for all, each adapter's part on its own rows.

A layer's product is the same for all rows, so the base layer runs once. What is added to it goes two ways: plain
products are added in place (:mod:`lorica.layers.products`); for what is not one, or is differentiated, each adapter's
rows are taken out and put back.

Deltas that go into the weights of a call (experts, attention) need a call for each adapter, on its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.errors import AdapterError
from lorica.init import Factors
from lorica.layers.products import add_products, is_product
from lorica.routing import Rows, each_group


def refuse_merged(layer: Any) -> None:
    """Refuse rows with adapters of their own on a weight that holds others.

    Raises:
        AdapterError: adapters are merged into the base weight.
    """
    if layer.merged_adapters:
        raise AdapterError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
            f"({layer.target_name}: {layer.merged_adapters})"
        )


def add_by_rows(layer: Any, base: Callable[..., Any], rows: Rows, names: list[str], *args: Any, **kwargs: Any) -> Any:
    """Run ``base`` with each adapter's part on its rows.

    Args:
        layer: the adapted layer, or what stands for it across the base layer's collectives.
        base: the base layer's own forward.
        rows: of the batch.
        names: the adapters of the layer that take part.
        args: of ``base``.
        kwargs: of ``base``.
    """
    op = layer.op
    groups = _agreed(layer, rows)
    if not names and len(groups) == len(rows.adapters):
        return base(*args, **kwargs)
    if len(groups) == 1:
        return op.forward(layer, base, layer.pairs(names), *args, **kwargs)
    if not op.inward:
        return op.forward(Mixed(layer, rows, names), base, [_ALL], *args, **kwargs)

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = op.by_rows(layer, args, kwargs, back=True)
        mine = rows.only(name)
        mine.kept["agreed"] = [name]
        with layer.switch.routed(mine):
            if name in layer.specs:
                output = op.forward(layer, base, layer.pairs([name]), *args, **kwargs)
            else:
                output = base(*args, **kwargs)
        return op.output_by_rows(layer, output)

    return op.output_by_rows(layer, each_group(rows, groups, call, *op.by_rows(layer, args, kwargs)))


def _agreed(layer: Any, rows: Rows) -> list[str]:
    """Return the names for which a call is made: where ranks with batches of their own share experts, all of theirs."""
    site = layer.site
    if site is None or site.layout.batches == 1 or not layer.op.inward:
        return rows.adapters
    if "agreed" not in rows.kept:
        cut = site.layout.cut_of("expert")
        axis = site.axes[cut.axis]
        theirs: list[Any] = [None] * axis.size
        dist.all_gather_object(theirs, rows.adapters, group=axis.group)
        rows.kept["agreed"] = sorted({name for names in theirs for name in names})
    found: list[str] = rows.kept["agreed"]
    return found


class Mixed:
    """An adapted layer, as an op sees it that adds the parts of all adapters at once.

    Args:
        layer: the layer.
        rows: of the batch.
        names: the adapters that take part, at least one.
    """

    def __init__(self, layer: Any, rows: Rows, names: Sequence[str]) -> None:
        self._layer = layer
        self._rows = rows
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def add(self, y: Tensor, x: Tensor, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return ``y`` with every adapter's part on its rows; the arguments behind ``x`` mean nothing here."""
        layer, rows, names = self._layer, self._rows, self._names
        carried = layer.site is not None and layer.site.carry is not None
        if torch.is_grad_enabled() or carried or not y.is_contiguous():
            return _each(layer, rows, y, x, names)
        products = [name for name in names if is_product(layer, layer.specs[name])]
        if products:
            add_products(layer, rows, y, x, products)
        if len(products) == len(names):
            return y
        return _each(layer, rows, y, x, [name for name in names if name not in products])


# ---- any op, any variant --------------------------------------------------------------------------------------------


def _each(layer: Any, rows: Rows, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
    """Return ``y`` with the parts of adapters, one after the other, in whatever way they are added."""
    items = len(x)
    found, places = [], []
    for name in names:
        here = rows.places(name, items, x.device)
        with layer.switch.routed(rows.only(name)):
            found.append(layer.add(_at(y, here), _at(x, here), layer.factors(name), layer.specs[name]))
        places.append(torch.arange(items, device=x.device)[here])
    return y.index_copy(0, torch.cat(places), torch.cat(found))


def _at(tensor: Tensor, here: slice | Tensor) -> Tensor:
    return tensor[here] if isinstance(here, slice) else tensor.index_select(0, here)


#: Stands for all adapters of a batch where an op wants one.
_ALL: Any = (None, None)

__all__ = ["Mixed", "add_by_rows", "refuse_merged"]
