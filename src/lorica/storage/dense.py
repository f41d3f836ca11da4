"""Weights of plain floating-point numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.storage.base import Room, Storage


class Dense:
    """A weight stored as plain floating-point numbers.

    Args:
        compute: the dtype in which deltas are added.
        exact: whether that is the dtype it is stored in.
    """

    whole = False

    def __init__(self, compute: torch.dtype, *, exact: bool) -> None:
        self.compute = compute
        self.exact = exact

    def dequantize(self, stored: Tensor, room: Room | None = None) -> Tensor:
        """Return ``stored`` itself where its dtype is the one computed in, else a copy, in ``room`` where there is."""
        if room is None or stored.dtype == self.compute:
            return stored.to(self.compute)
        return room.copy(stored, self.compute)

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
