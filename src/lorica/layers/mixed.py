"""Batches whose rows have different adapters: the base layer once for all, each adapter's part on its own rows.

A layer's product is the same for all rows, so the base layer runs once. What is added to it goes three ways:

- Few tokens to a row (decoding): the factors of the adapters are stacked once and multiplied in one batched product.
- Many tokens (a prompt): each run of neighbouring rows is a view; its part is added in place, and nothing is copied.
- What is not a plain product, or is differentiated: each adapter's rows are taken out, and put back.

Deltas that go into the weights of a call (experts, attention) need a call for each adapter, on its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.errors import AdapterError
from lorica.init import Factors
from lorica.ops import Op
from lorica.ops.base import share_of_bias
from lorica.routing import Rows, each_group
from lorica.variants import VARIANTS, Variant

#: Up to this many tokens to a row, rows are sorted and multiplied in one batched product.
FEW_TOKENS = 8


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
        products = [name for name in names if _is_product(layer, layer.specs[name])]
        if products:
            _products(layer, rows, y, x, products)
        if len(products) == len(names):
            return y
        return _each(layer, rows, y, x, [name for name in names if name not in products])


def _is_product(layer: Any, spec: AdapterSpec) -> bool:
    if spec.dropout and layer.training:
        return False
    return type(VARIANTS[spec.variant]).add is Variant.add and type(layer.op).matrices is not Op.matrices


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


# ---- plain products, in place ---------------------------------------------------------------------------------------


def _products(layer: Any, rows: Rows, y: Tensor, x: Tensor, names: Sequence[str]) -> None:
    """Add the parts of plain adapters to ``y`` in place.

    Args:
        layer: the adapted layer.
        rows: of the batch.
        y: ``[items, …, out]``, contiguous.
        x: ``[items, …, in]``.
        names: the adapters.
    """
    items = len(x)
    y_NTO, x_NTI = y.view(items, -1, y.shape[-1]), x.to(y.dtype).reshape(items, -1, x.shape[-1])
    runs = rows.runs(items)
    if y_NTO.shape[1] * rows.items_per_row(items) <= FEW_TOKENS and len(runs) > 1:
        _batched(layer, rows, y_NTO, x_NTI, names)
        return
    made = {name: _matrices(layer, name, y.dtype) for name in names}
    for name, start, stop in runs:
        if name in made:
            a_RI, b_OR, bias = made[name]
            y_TO, scale = y_NTO[start:stop].flatten(0, 1), layer.specs[name].scaling
            y_TO.addmm_(x_NTI[start:stop].flatten(0, 1) @ a_RI.mT, b_OR.mT, alpha=scale)
            if bias is not None:
                y_TO.add_(bias, alpha=scale)


def _matrices(layer: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    spec = layer.specs[name]
    factors = VARIANTS[spec.variant].in_forward(layer, layer.factors(name), spec)
    a_RI, b_OR = layer.op.matrices(layer, factors)
    return a_RI.to(dtype), b_OR.to(dtype), share_of_bias(layer, factors, dtype)


class _Stack(NamedTuple):
    """The factors of adapters of one rank, each with the same number of items.

    Attributes:
        items: how many each has.
        a: ``[adapters, in, r]``.
        b: ``[adapters, r, out]``.
        bias: ``[adapters, 1, out]``, scaled, or None.
        scales: ``[adapters, 1, 1]``.
    """

    items: int
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scales: Tensor


def _batched(layer: Any, rows: Rows, y_NTO: Tensor, x_NTI: Tensor, names: Sequence[str]) -> None:
    """Add the parts of many adapters with few tokens each: one batched product for each number of items and rank."""
    items, tokens = x_NTI.shape[:2]
    key = (id(layer.base_layer), y_NTO.dtype, items)
    order, stacks = rows.kept.get(key) or _stacks(layer, rows, names, y_NTO.dtype, items)
    if rows.lasting:
        rows.kept[key] = (order, stacks)
    x_NTI = x_NTI.index_select(0, order)
    start = 0
    for count, a, b, bias, scales in stacks:
        adapters, stop = len(a), start + len(a) * count
        h = torch.bmm(x_NTI[start:stop].view(adapters, count * tokens, -1), a).mul_(scales)
        part = torch.bmm(h, b) if bias is None else torch.baddbmm(bias, h, b)
        y_NTO.index_add_(0, order[start:stop], part.view(adapters * count, tokens, -1))
        start = stop


def _stacks(
    layer: Any, rows: Rows, names: Sequence[str], dtype: torch.dtype, items: int
) -> tuple[Tensor, list[_Stack]]:
    """Return the order in which the items are taken, and the factors in that order."""
    counts = dict.fromkeys(names, 0)
    for name, start, stop in rows.runs(items):
        if name in counts:
            counts[name] += stop - start
    made = {name: _matrices(layer, name, dtype) for name in names}
    alike: dict[tuple[int, int, bool], list[str]] = {}
    for name, (a_RI, _, bias) in made.items():
        alike.setdefault((counts[name], len(a_RI), bias is None), []).append(name)
    stacks = []
    for (count, r, _), group in alike.items():
        a, b, biases = zip(*(made[name] for name in group), strict=True)
        scales = [layer.specs[name].scaling for name in group]
        scales_U11 = torch.tensor(scales, dtype=dtype, device=a[0].device).view(-1, 1, 1)
        bias = None if biases[0] is None else torch.stack(biases).unsqueeze(1) * scales_U11
        a_UIR, b_URO = torch.cat(a).view(len(a), r, -1).mT, torch.cat(b).view(len(b), -1, r).mT
        stacks.append(_Stack(count, a_UIR, b_URO, bias, scales_U11))
    return rows.index([name for group in alike.values() for name in group], items, scales_U11.device), stacks


#: Stands for all adapters of a batch where an op wants one.
_ALL: Any = (None, None)

__all__ = ["FEW_TOKENS", "Mixed", "add_by_rows", "refuse_merged"]
