"""Weights are changed in two steps: all that is to be done is worked out first, for all layers, and then done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.storage import Change, Packed, Room, Storage, Term, add_low_rank_


class Rewrite(NamedTuple):
    """What merges adapters into the weight of one layer, or takes them out; worked out, and not yet done.

    Attributes:
        write: changes the weight.
        settle: notes what is merged then.
        inexact: the dtype of a weight that cannot be given back up to float32's rounding; None: it is.
    """

    write: Change
    settle: Callable[[], None]
    inexact: torch.dtype | None = None


def change_kernel(weight: Tensor, terms: Sequence[Term], form: Storage, undo: bool, room: Room | None) -> None:
    """Change the kernel of a convolution."""
    matrix = weight.flatten(1)
    add_low_rank_(matrix, terms, form, undo=undo, room=room)
    if matrix.data_ptr() != weight.data_ptr():  # one that is stored channels last has no two-dimensional view
        weight.copy_(matrix.view(weight.shape))


def rewrite_packed(weight: Packed, terms: Sequence[Term], undo: bool, room: Room | None) -> None:
    """Change a quantised weight; what that costs is not asked."""
    add_low_rank_(weight, terms, weight.storage, undo=undo)


def carry_out(rewrites: Iterable[Rewrite]) -> None:
    """Write weights one after the other, and note what is merged then, also where an error ends it half-way.

    All is noted after the last weight: see :func:`lorica.storage.change_of`.
    """
    room, written = Room(), list[Rewrite]()
    try:
        for rewrite in rewrites:
            rewrite.write(room)
            written.append(rewrite)
    finally:
        for rewrite in written:
            rewrite.settle()
