"""How a base weight is stored, and how a low-rank delta gets into it.

A storage answers two questions, ``dequantize`` and ``requantize``; merging is written once, here, over any of them.
:mod:`lorica.storage.kinds` finds the storage of a layer's weight; each kind is one file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.storage.base import Packed, Quantised, Storage
from lorica.storage.dense import STORAGES, Dense
from lorica.storage.kinds import KINDS, LINEARS, kind_of, storage_of, stored_weight

#: Elements of a row chunk while merging: the only extra memory is that many float32 values.
CHUNK_ELEMENTS = 4 * 1024 * 1024


class Term(NamedTuple):
    """One adapter's change of a weight ``[rows, cols]``: to ``gain · (weight + scale · left · right)``.

    Attributes:
        left: ``[rows, r]``.
        right: ``[r, cols]``.
        scale: of the product.
        gain: ``[rows, 1]`` or ``[1, cols]``, nowhere zero; None: 1.
    """

    left: Tensor
    right: Tensor
    scale: float
    gain: Tensor | None = None

    def of(self, expert: int) -> Term:
        """Return the change of one weight of a stack."""
        left, right = (factor[expert] if factor.dim() == 3 else factor for factor in (self.left, self.right))
        return self._replace(left=left, right=right)


class MergeError(NamedTuple):
    """What storing a changed weight in a quantised form cost: relative sizes (Frobenius norm) of the error.

    Attributes:
        weight: of the stored weight against the wanted one, ``‖Q(W + Δ) - (W + Δ)‖ / ‖W + Δ‖``.
        delta: the same error against what was to be added, ``‖Q(W + Δ) - (W + Δ)‖ / ‖Δ‖``. Where it is near 1 or
            above, little of the adapter is left.
    """

    weight: float
    delta: float


@torch.no_grad()
def add_low_rank_(
    weight: Tensor | Packed,
    terms: Sequence[Term],
    storage: Storage,
    *,
    undo: bool = False,
    source: Packed | None = None,
) -> MergeError | None:
    """Change ``weight`` in place by every term in turn, in chunks of rows, rounding each element once.

    A quantised weight is written all at once, from all its values in float32.

    Args:
        weight: ``[rows, cols]``, any strides, or a stack ``[E, rows, cols]`` of them.
        terms: the changes, in the order in which they are made.
        storage: how ``weight`` is stored.
        undo: take the changes back, the last one first.
        source: the quantised weight that is to be changed, where ``weight`` has changed since; None: ``weight`` itself.

    Returns:
        How far the stored weight is from the wanted one, of a quantised weight; None of others.

    Raises:
        AdapterError: the quantised form cannot take a delta.
    """
    if weight.dim() == 3:
        for e, matrix in enumerate(weight.unbind(0)):  # type: ignore[union-attr]
            add_low_rank_(matrix, [term.of(e) for term in terms], storage, undo=undo)
        return None
    if isinstance(weight, Packed):
        return _rewrite(weight, terms, weight if source is None else source, undo=undo)
    rows, cols = weight.shape
    step = max(1, CHUNK_ELEMENTS // max(1, cols))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        values = storage.dequantize(weight[chunk])
        _apply(values, terms, chunk, undo=undo)
        storage.requantize(weight[chunk], values)
    return None


def _apply(values: Tensor, terms: Sequence[Term], rows: slice, *, undo: bool) -> None:
    for left, right, scale, gain in reversed(terms) if undo else terms:
        gain = gain if gain is None or len(gain) == 1 else gain[rows]
        if undo and gain is not None:
            values.div_(gain)
        values.addmm_(left[rows].to(values), right.to(values), alpha=-scale if undo else scale)
        if not undo and gain is not None:
            values.mul_(gain)


def _rewrite(weight: Packed, terms: Sequence[Term], source: Packed, *, undo: bool) -> MergeError:
    values = source.dequantize()
    _apply(values, terms, slice(None), undo=undo)
    return write_values(weight, values, source)


@torch.no_grad()
def write_values(weight: Packed, values: Tensor, source: Packed | None = None) -> MergeError:
    """Quantise a weight anew: what a number is stored as depends on its neighbours, so it is written all at once.

    Args:
        weight: all rows of it.
        values: ``[rows, cols]``, float32.
        source: the weight that ``values`` was made from, for the comparison; None: ``weight`` as it is now.

    Raises:
        AdapterError: the form cannot be written.
    """
    size, changed = float(values.norm()), _distance(weight if source is None else source, values)
    weight.storage.requantize(weight, values)
    error = _distance(weight, values)
    return MergeError(error / size if size else error, error / changed if changed else 0.0)


def _distance(stored: Packed, values: Tensor) -> float:
    rows, cols = values.shape
    step = max(1, CHUNK_ELEMENTS // max(1, cols)) if stored.storage.chunked else rows
    square = 0.0
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        square += float((stored[chunk].dequantize() - values[chunk]).square().sum(dtype=torch.float64))
    return math.sqrt(square)


__all__ = [
    "CHUNK_ELEMENTS",
    "KINDS",
    "LINEARS",
    "STORAGES",
    "Dense",
    "MergeError",
    "Packed",
    "Quantised",
    "Storage",
    "Term",
    "add_low_rank_",
    "kind_of",
    "storage_of",
    "stored_weight",
    "write_values",
]
