"""How a base weight is stored, and how a low-rank delta gets into it.

A storage answers two questions, ``dequantize`` and ``requantize``; merging is written once, here, over any of them.
Adding a storage is one class and one line in ``STORAGES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorica.errors import AdapterError

#: Elements of a row chunk while merging: the only extra memory is that many float32 values.
CHUNK_ELEMENTS = 4 * 1024 * 1024


class Storage(Protocol):
    """What merging needs to know of a way to store a weight ``[rows, cols]``."""

    #: Whether a merged delta can be taken out again up to the rounding of float32.
    exact: bool

    def dequantize(self, stored: Tensor) -> Tensor:
        """Return the values as float32 (float64 stays). May share memory with ``stored``."""

    def requantize(self, stored: Tensor, values: Tensor) -> None:
        """Write ``values`` over ``stored``, rounding once."""


class Dense:
    """A weight stored as plain floating-point numbers."""

    def __init__(self, compute: torch.dtype, *, exact: bool) -> None:
        self.compute = compute
        self.exact = exact

    def dequantize(self, stored: Tensor) -> Tensor:
        """Return ``stored`` itself where its dtype is the one computed in, else a copy."""
        return stored.to(self.compute)

    def requantize(self, stored: Tensor, values: Tensor) -> None:
        """Copy, unless ``values`` already is ``stored``."""
        if values.data_ptr() != stored.data_ptr():
            stored.copy_(values)


STORAGES: dict[torch.dtype, Storage] = {
    torch.float64: Dense(torch.float64, exact=True),
    torch.float32: Dense(torch.float32, exact=True),
    torch.bfloat16: Dense(torch.float32, exact=False),
    torch.float16: Dense(torch.float32, exact=False),
}


def storage_of(weight: Tensor, where: str) -> Storage:
    """Return the storage of ``weight``.

    Raises:
        AdapterError: no storage is known for its dtype; ``where`` names the module.
    """
    try:
        return STORAGES[weight.dtype]
    except KeyError:
        raise AdapterError(
            f"{where}: a base weight stored as {weight.dtype} cannot take a delta; known: {[*map(str, STORAGES)]}"
        ) from None


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


@torch.no_grad()
def add_low_rank_(weight: Tensor, terms: Sequence[Term], storage: Storage, *, undo: bool = False) -> None:
    """Change ``weight`` in place by every term in turn, in chunks of rows, rounding each element once.

    Args:
        weight: ``[rows, cols]``, any strides, or a stack ``[E, rows, cols]`` of them.
        terms: the changes, in the order in which they are made.
        storage: how ``weight`` is stored.
        undo: take the changes back, the last one first.
    """
    if weight.dim() == 3:
        for e, matrix in enumerate(weight.unbind(0)):
            add_low_rank_(matrix, [term.of(e) for term in terms], storage, undo=undo)
        return
    rows, cols = weight.shape
    step = max(1, CHUNK_ELEMENTS // max(1, cols))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        values = storage.dequantize(weight[chunk])
        for left, right, scale, gain in reversed(terms) if undo else terms:
            gain = gain if gain is None or len(gain) == 1 else gain[chunk]
            if undo and gain is not None:
                values.div_(gain)
            values.addmm_(left[chunk].to(values), right.to(values), alpha=-scale if undo else scale)
            if not undo and gain is not None:
                values.mul_(gain)
        storage.requantize(weight[chunk], values)
