"""A low-rank delta gets into a stored weight: in place, a chunk at a time, each element rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.storage.base import Packed, Room, Storage

#: Elements of a chunk while merging, at most. Beside the model, merging needs that many float32 values.
CHUNK_ELEMENTS = 4 * 1024 * 1024
#: The same on a CPU, for each thread: three quarters of what a core's second-level cache usually holds. A chunk is
#: written and read three times, which then costs no traffic to memory; a smaller one has threads wait for each other
#: more often.
CACHED_ELEMENTS = 384 * 1024


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

    def rows(self, part: slice) -> Term:
        """Return the change of some rows of a weight, or of some weights of a stack."""
        left, right, scale, gain = self
        if gain is not None and len(gain) > 1:
            gain = gain[part]
        return Term(left[part], right[part] if right.dim() == 3 else right, scale, gain)

    def fits(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether the factors are in a dtype, and where the weight is."""
        return self.left.dtype == dtype == self.right.dtype and self.left.device == weight.device

    def to(self, weight: Tensor, dtype: torch.dtype) -> Term:
        """Return the same in the dtype that is computed in, where the weight is; with one pair for each of a stack."""
        left, right = self.left, self.right
        if not self.fits(weight, dtype):
            left, right = left.to(weight.device, dtype), right.to(weight.device, dtype)
        if weight.dim() == 3:
            left, right = (factor.expand(len(weight), -1, -1) for factor in (left, right))
        return Term(left, right, self.scale, self.gain)


class MergeError(NamedTuple):
    """What storing a changed weight in a quantised form cost: relative sizes (Frobenius norm) of the error.

    Attributes:
        weight: of the stored weight against the wanted one, ``‖Q(W + Δ) - (W + Δ)‖ / ‖W + Δ‖``.
        delta: the same error against what was to be added, ``‖Q(W + Δ) - (W + Δ)‖ / ‖Δ‖``. Where it is near 1 or
            above, little of the adapter is left.
    """

    weight: float
    delta: float


def add_low_rank_(
    weight: Tensor | Packed,
    terms: Sequence[Term],
    storage: Storage,
    *,
    undo: bool = False,
    source: Packed | None = None,
    room: Room | None = None,
) -> MergeError | None:
    """Change ``weight`` in place by every term in turn, rounding each element once.

    A weight that is stored in the dtype it is computed in is changed where it lies, and nothing is allocated. Others
    are, a chunk of rows at a time. A quantised weight is written all at once, from all its values in float32.

    To be called without autograd.

    Args:
        weight: ``[rows, cols]``, any strides, or a stack ``[E, rows, cols]`` of them.
        terms: the changes, in the order in which they are made.
        storage: how ``weight`` is stored.
        undo: take the changes back, the last one first.
        source: the quantised weight that is to be changed, where ``weight`` has changed since; None: ``weight`` itself.
        room: memory for the chunks, where several weights are changed one after the other; None: some is allocated.

    Returns:
        How far the stored weight is from the wanted one, of a quantised weight; None of others.

    Raises:
        AdapterError: the quantised form cannot take a delta.
    """
    if isinstance(weight, Packed):
        return _rewrite(weight, terms, weight if source is None else source, undo=undo)
    _write(_pieces(weight, terms, storage, undo=undo), room)
    return None


#: A change of a weight that is ready to be made, given memory for the chunks (:func:`add_low_rank_`) or none.
Change = Callable[[Room | None], None]


def change_of(weight: Tensor, terms: Sequence[Term], storage: Storage, *, undo: bool = False) -> Change:
    """Return what :func:`add_low_rank_` does to a weight of plain numbers, ready to be done.

    Between two large products little of the interpreter's memory is left in a processor's cache, and each line takes
    several times as long. So as much as possible is worked out here, for all weights before the first is written: but
    nothing that copies numbers, and no more than one tensor's views.
    """
    if weight.dim() == 2 and _is_whole(weight, storage) and all(term.fits(weight, storage.compute) for term in terms):
        return partial(_write, [_Piece(weight, terms[::-1] if undo else terms, storage, undo)])
    return partial(_write, _pieces(weight, terms, storage, undo=undo))


class _Piece(NamedTuple):
    """Some rows of a weight, or some weights of a stack, and what is to be done to them."""

    stored: Tensor
    terms: Sequence[Term]  # of these rows, in the dtype that is computed in, in the order to be gone through
    storage: Storage
    undo: bool


def _write(pieces: Iterable[_Piece], room: Room | None = None) -> None:
    room = Room() if room is None else room
    for stored, terms, storage, undo in pieces:
        values = storage.dequantize(stored, room)
        _apply(values, terms, undo=undo)
        storage.requantize(stored, values)


def _pieces(weight: Tensor, terms: Sequence[Term], storage: Storage, *, undo: bool) -> Iterator[_Piece]:
    """Yield the pieces of a weight; the memory of one is given up before the next is asked for."""
    if weight.dim() == 3 and not _are_one_product(weight, terms):
        for e, matrix in enumerate(weight.unbind(0)):
            yield from _pieces(matrix, [term.of(e) for term in terms], storage, undo=undo)
        return
    terms = [term.to(weight, storage.compute) for term in (reversed(terms) if undo else terms)]
    if _is_whole(weight, storage):
        yield _Piece(weight, terms, storage, undo)
        return
    for part in chunks(weight):
        yield _Piece(weight[part], [term.rows(part) for term in terms], storage, undo)


def _is_whole(weight: Tensor, storage: Storage) -> bool:
    """Whether a weight is one piece: changed where it lies, or no larger than a chunk."""
    return (storage.exact and 1 in weight.stride()) or weight.numel() <= chunk_elements(weight.device)


def _are_one_product(weight: Tensor, terms: Sequence[Term]) -> bool:
    """Whether the weights of a stack are changed by batched products: where each of them fits into one chunk."""
    return (
        weight.is_contiguous()
        and math.prod(weight.shape[1:]) <= chunk_elements(weight.device)
        and all(term.gain is None for term in terms)
    )


def first_not_finite(weight: Tensor, terms: Sequence[Term], storage: Storage, room: Room | None = None) -> int | None:
    """Return the first term after which the weight, stored as it is, would hold NaN or infinity; None: none of them.

    Nothing is written; chunks are tried one after the other. To be called without autograd.

    Args:
        weight: ``[rows, cols]`` or a stack ``[E, rows, cols]``; where it is quantised, its values.
        terms: the changes, in the order in which they are to be made.
        storage: how ``weight`` is stored.
        room: memory for the chunks, as in :func:`add_low_rank_`.
    """
    room = Room() if room is None else room
    if weight.dim() == 3:
        found = (
            first_not_finite(matrix, [term.of(e) for term in terms], storage, room)
            for e, matrix in enumerate(weight.unbind(0))
        )
        return min((index for index in found if index is not None), default=None)
    first, terms = len(terms), [term.to(weight, storage.compute) for term in terms]
    for part in chunks(weight) if weight.numel() else ():
        values = room.copy(weight[part], storage.compute)
        for index, term in enumerate(terms[:first]):
            _apply(values, [term.rows(part)], undo=False)
            if not _finite(values, weight.dtype):
                first = index
                break
    return None if first == len(terms) else first


def _finite(values: Tensor, dtype: torch.dtype) -> bool:
    # Rounding keeps the order, so the least and the greatest tell of all; NaN is handed on to both.
    return all(math.isfinite(float(end.to(dtype))) for end in torch.aminmax(values))


def chunk_elements(device: torch.device) -> int:
    """Return how many elements of a weight are computed with at a time."""
    if device.type == "cpu":
        return min(CHUNK_ELEMENTS, CACHED_ELEMENTS * torch.get_num_threads())
    return CHUNK_ELEMENTS


def chunks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension, each of as many elements as are computed with at a time."""
    step = max(1, chunk_elements(weight.device) // max(1, math.prod(weight.shape[1:])))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _apply(values: Tensor, terms: Sequence[Term], *, undo: bool) -> None:
    """Change values by terms in the given order."""
    for left, right, scale, gain in terms:
        if undo and gain is not None:
            values.div_(gain)
        add = values.baddbmm_ if values.dim() == 3 else values.addmm_
        add(left, right, alpha=-scale if undo else scale)
        if not undo and gain is not None:
            values.mul_(gain)


def _rewrite(weight: Packed, terms: Sequence[Term], source: Packed, *, undo: bool) -> MergeError:
    values = source.dequantize()
    terms = [term.to(values, values.dtype) for term in (reversed(terms) if undo else terms)]
    _apply(values, terms, undo=undo)
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
    "CACHED_ELEMENTS",
    "CHUNK_ELEMENTS",
    "Change",
    "MergeError",
    "Term",
    "add_low_rank_",
    "change_of",
    "chunks",
    "first_not_finite",
    "write_values",
]
