"""How a base weight is stored, and how a low-rank delta gets into it.

A storage answers two questions, ``dequantize`` and ``requantize``; merging is written once, here, over any of them.
Adding a storage is one class and one line in ``STORAGES``.
"""

from __future__ import annotations

from typing import Protocol

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


@torch.no_grad()
def add_low_rank_(weight: Tensor, left: Tensor, right: Tensor, scale: float, storage: Storage) -> None:
    """Compute ``weight += scale · left · right`` in place, in chunks of rows, rounding each element once.

    Args:
        weight: ``[rows, cols]``, any strides.
        left: ``[rows, r]``.
        right: ``[r, cols]``.
        scale: ``s``.
        storage: how ``weight`` is stored.
    """
    rows, cols = weight.shape
    step = max(1, CHUNK_ELEMENTS // max(1, cols))
    left, right = (factor.to(weight.device) for factor in (left, right))
    for start in range(0, rows, step):
        stored = weight[start : start + step]
        values = storage.dequantize(stored)
        compute = values.dtype
        values.addmm_(left[start : start + step].to(compute), right.to(compute), alpha=scale)
        storage.requantize(stored, values)
