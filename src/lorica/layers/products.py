"""The low-rank parts of many adapters, added in place to one output: each adapter's on its own rows.

Two forms, of which :func:`_batching_pays` takes the one that moves less:

- Runs: each run of neighbouring rows is a view, multiplied with its adapter's factors where they are.
- Batches: the factors of adapters of one rank are laid one behind the other and multiplied in one batched product. They
  are copied a piece at a time, into room that stays in the cache, so that the memory does not grow with the adapters;
  where many forwards have the same rows, they are copied once and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.ops import Op
from lorica.ops.base import share_of_bias
from lorica.ops.linear import Linear
from lorica.routing import Rows, Run
from lorica.variants import VARIANTS, Variant

#: Bytes of factors that are copied at a time: they are read again while the cache has them.
PIECE = 2**19
#: What the Python and the calls for one run cost, as bytes that could be moved in that time (12 µs at 10 GB/s).
RUN = 2**17


class Pair(NamedTuple):
    """The factors of one adapter, in their own dtype.

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``.
        bias: ``[out]`` or None, in the output's dtype.
        scaling: ``s``.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float

    @property
    def nbytes(self) -> int:
        """Size of both factors."""
        return self.a.nbytes + self.b.nbytes


def add_products(layer: Any, rows: Rows, y: Tensor, x: Tensor, names: Sequence[str]) -> None:
    """Add the parts of plain adapters to ``y`` in place.

    Args:
        layer: the adapted layer.
        rows: of the batch.
        y: ``[items, …, out]``, contiguous.
        x: ``[items, …, in]``.
        names: the adapters, in the order of their first rows.
    """
    items = len(x)
    y_NTO, x_NTI = y.view(items, -1, y.shape[-1]), x.to(y.dtype).reshape(items, -1, x.shape[-1])
    key = (id(layer.base_layer), y.dtype, items)
    stacks: list[_Stack] | None = rows.kept.get(key)
    if stacks is None:
        pairs, runs = _pairs(layer, names, y.dtype), rows.runs(items)
        stacks = _stacks(pairs, rows, items, y.device)
        if not _batching_pays(stacks, y_NTO, x_NTI, [run for run in runs if run.name in pairs], kept=rows.lasting):
            _add_runs(y_NTO, x_NTI, runs, pairs)
            return
        if rows.lasting:
            rows.kept[key] = stacks = [stack.copied(y.dtype) for stack in stacks]
    for stack in stacks:
        stack.add(y_NTO, x_NTI)


# ---- the factors ----------------------------------------------------------------------------------------------------


def is_product(layer: Any, spec: AdapterSpec) -> bool:
    """Tell whether an adapter's part is ``s·(x Aᵀ) Bᵀ`` with two matrices that the op can name."""
    if spec.dropout and layer.training:
        return False
    return _adds_plainly(spec.variant) and _has_matrices(layer.op.__class__)


def _adds_plainly(variant: str) -> bool:
    kind = type(VARIANTS[variant])
    return kind.add is Variant.add and kind.after is Variant.after and kind.gain is Variant.gain


def _is_plain(variant: str) -> bool:
    return type(VARIANTS[variant]).in_forward is Variant.in_forward


def _has_matrices(op: type[Op]) -> bool:
    return op.matrices is not Op.matrices


def _pairs(layer: Any, names: Sequence[str], dtype: torch.dtype) -> dict[str, Pair]:
    """Return the factors of adapters: of most, parameters that are only picked up."""
    specs, plainly = layer.specs, type(layer.op).matrices is Linear.matrices and not layer.tied
    first, second = (container._modules for container in layer._containers())
    pairs = {}
    for name in names:
        spec = specs[name]
        if plainly and _is_plain(spec.variant):
            a, b = first[name]._parameters, second[name]._parameters
            a_RI, b_OR = a.get("weight"), b.get("weight")
            if type(a_RI) is type(b_OR) is nn.Parameter and b.get("bias") is None:
                pairs[name] = Pair(a_RI, b_OR, None, spec.scaling)
                continue
        factors = VARIANTS[spec.variant].in_forward(layer, layer.factors(name), spec)
        a_RI, b_OR = layer.op.matrices(layer, factors)
        pairs[name] = Pair(a_RI, b_OR, share_of_bias(layer, factors, dtype), spec.scaling)
    return pairs


# ---- runs -----------------------------------------------------------------------------------------------------------


def _add_runs(y_NTO: Tensor, x_NTI: Tensor, runs: Sequence[Run], pairs: dict[str, Pair]) -> None:
    dtype, tokens = y_NTO.dtype, y_NTO.shape[1]
    sizes = [(stop - start) * tokens for _, start, stop in runs]
    pieces = torch.split(y_NTO.flatten(0, 1), sizes), torch.split(x_NTI.flatten(0, 1), sizes)
    for (name, *_), y_TO, x_TI in zip(runs, *pieces, strict=True):
        if name in pairs:
            a_RI, b_OR, bias, scaling = pairs[name]
            y_TO.addmm_(x_TI.mm(a_RI.to(dtype).t()), b_OR.to(dtype).t(), alpha=scaling)
            if bias is not None:
                y_TO.add_(bias, alpha=scaling)


# ---- batches --------------------------------------------------------------------------------------------------------


def _batching_pays(stacks: Sequence[_Stack], y_NTO: Tensor, x_NTI: Tensor, runs: Sequence[Run], *, kept: bool) -> bool:
    """Tell whether copying factors (and rows, where an adapter's do not stand together) moves less than runs cost."""
    token = (2 * x_NTI.shape[2] + 3 * y_NTO.shape[2]) * y_NTO.element_size() * y_NTO.shape[1]
    moved = 0
    for stack in stacks:
        each = 0 if kept else stack.pairs[0].nbytes
        each += token * stack.items if isinstance(stack.order, Tensor) else 0
        moved += each * len(stack.pairs)
    return moved < RUN * (len(runs) - len(stacks))


class _Stack:
    """Adapters of one rank, each with the same number of items.

    Args:
        pairs: their factors.
        items: how many each has.
        order: where the items are, one adapter's after the other.
    """

    def __init__(self, pairs: Sequence[Pair], items: int, order: slice | Tensor) -> None:
        self.pairs = pairs
        self.items = items
        self.order = order
        self._copied: tuple[Tensor, Tensor] | None = None
        scales = [pair.scaling for pair in pairs]
        self._scale = scales[0] if len(set(scales)) == 1 else None
        self._scales = scales

    def copied(self, dtype: torch.dtype) -> _Stack:
        """Return the same with copies of the factors that it keeps."""
        _, _, a_URI, b_UOR = next(self._pieces(dtype, len(self.pairs)))
        self._copied = a_URI, b_UOR
        return self

    def add(self, y_NTO: Tensor, x_NTI: Tensor) -> None:
        """Add the adapters' parts."""
        adapters, order = len(self.pairs), self.order
        x_NTI = x_NTI[order] if isinstance(order, slice) else x_NTI.index_select(0, order)
        x_UTI = x_NTI.view(adapters, -1, x_NTI.shape[2])
        for start, stop, a_URI, b_UOR in self._pieces(y_NTO.dtype):
            h_UTR = torch.bmm(x_UTI[start:stop], a_URI.mT)
            if self._scale is None:
                h_UTR.mul_(self._scales_like(y_NTO)[start:stop])
            self._put(y_NTO, start, stop, h_UTR, b_UOR.mT)

    def _put(self, y_NTO: Tensor, start: int, stop: int, h_UTR: Tensor, b_URO: Tensor) -> None:
        (_, tokens, outer), alpha = y_NTO.shape, 1 if self._scale is None else self._scale
        bias_U1O = None
        if self.pairs[0].bias is not None:
            bias_U1O = torch.stack([pair.bias for pair in self.pairs[start:stop]]).unsqueeze(1)  # type: ignore[misc]
            bias_U1O = bias_U1O if self._scale is not None else bias_U1O * self._scales_like(y_NTO)[start:stop]
        if isinstance(self.order, slice):
            y_UTO = y_NTO[self.order].view(len(self.pairs), -1, outer)[start:stop]
            y_UTO.baddbmm_(h_UTR, b_URO, alpha=alpha)
            if bias_U1O is not None:
                y_UTO.add_(bias_U1O, alpha=alpha)
            return
        part = torch.bmm(h_UTR, b_URO) if bias_U1O is None else torch.baddbmm(bias_U1O, h_UTR, b_URO)
        order = self.order[start * self.items : stop * self.items]
        y_NTO.index_add_(0, order, part.view(-1, tokens, outer), alpha=alpha)

    def _scales_like(self, like: Tensor) -> Tensor:
        return torch.tensor(self._scales, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    def _pieces(self, dtype: torch.dtype, count: int = 0) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield A ``[U, r, in]`` and B ``[U, out, r]`` of some adapters after the other; the next overwrite them."""
        adapters, (first, *_) = len(self.pairs), self.pairs
        if self._copied is not None:
            yield 0, adapters, *self._copied
            return
        count = count or min(adapters, max(1, PIECE // first.nbytes))
        (r, inner), outer = first.a.shape, len(first.b)
        a, b = (first.a.new_empty(count * size, dtype=dtype) for size in (r * inner, outer * r))
        for start in range(0, adapters, count):
            some = self.pairs[start : start + count]
            n = len(some)
            a_URI, b_UOR = a[: n * r * inner].view(n, r, inner), b[: n * outer * r].view(n, outer, r)
            torch.cat([pair.a for pair in some], out=a_URI.view(-1, inner))
            torch.cat([pair.b for pair in some], out=b_UOR.view(-1, r))
            yield start, start + n, a_URI, b_UOR


def _stacks(pairs: dict[str, Pair], rows: Rows, items: int, device: torch.device) -> list[_Stack]:
    counts = rows.counts(items)
    alike: dict[tuple[int, int, bool], list[str]] = {}
    for name, pair in pairs.items():
        alike.setdefault((counts[name], pair.a.shape[0], pair.bias is None), []).append(name)
    return [
        _Stack([pairs[name] for name in group], count, rows.order(group, items, device))
        for (count, *_), group in alike.items()
    ]


__all__ = ["Pair", "add_products", "is_product"]
