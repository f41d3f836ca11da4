"""Several pairs as one, for systems whose fused layers have one A, and back.

Pairs that share their A are one without further ado: B's rows follow one another. Otherwise their A's are put one below
the other and their B's into blocks, with zeros between, so that the rank is the sum of the ranks::

    A = [A_q]        B = [B_q  0    0 ]
        [A_k]            [0    B_k  0 ]
        [A_v]            [0    0    B_v]

which is exact, and larger. Where a smaller rank is asked for, the product of these two is cut to its largest singular
values (Eckart and Young), and what was lost is said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.convert.adapter import Lazy, Pair, concatenated, share_a
from lorica.convert.scales import is_close
from lorica.errors import CheckpointError, ExportError
from lorica.lowrank import cut, svd_of_product, wide


class Layer(NamedTuple):
    """A layer that is several of transformers'.

    Attributes:
        names: theirs, in the order of its rows.
        rows: how many of each; None: it is not known, and only needed where one of them has no adapter.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] | None = None


class Block(NamedTuple):
    """A stretch of a pair's rank.

    Attributes:
        names: the projections that have it; B is zero elsewhere.
        rank: how long it is.
        scale: of the pair that it was, before the scale of others was given to it.
    """

    names: tuple[str, ...]
    rank: int
    scale: float


@dataclass
class Fused:
    """Pairs for a system whose layers have one A each.

    Attributes:
        pairs: one for each layer.
        blocks: full names of a pair → what it is made of.
        errors: what truncation lost of each, relative to the norm of its delta.
    """

    pairs: list[Pair] = field(default_factory=list)
    blocks: dict[tuple[str, ...], list[Block]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def record(self) -> list[dict[str, Any]]:
        """Return what a record has to say, of the pairs that are not what they were."""
        made = {pair.names: [Block(pair.names, pair.rank, pair.scale)] for pair in self.pairs}
        return [
            {"names": list(names), "blocks": [block._asdict() for block in blocks]}
            for names, blocks in self.blocks.items()
            if names in made and blocks != made[names]
        ]


def fuse(
    pairs: Iterable[Pair],
    layer_of: Callable[[str], Layer],
    *,
    rank: int | None = None,
    rounding: bool = False,
) -> Fused:
    """Return one pair for each layer.

    Args:
        pairs: any.
        layer_of: a name → the layer that it is part of.
        rank: the largest rank; larger ones are cut. None: nothing is lost.
        rounding: let scales that differ be multiplied into B where that rounds.

    Raises:
        ExportError: it cannot be done; see :func:`scaled`.
    """
    groups: dict[tuple[str, ...], list[Pair]] = {}
    layers: dict[tuple[str, ...], Layer] = {}
    for pair in pairs:
        inside = set(pair.names) <= set(layer_of(pair.names[0]).names)
        for part in [pair] if inside else pair.split():
            layer = layer_of(part.names[0])
            groups.setdefault(layer.names, []).append(part)
            layers[layer.names] = layer
    result = Fused()
    for names, group in groups.items():
        joined, blocks = _joined(layers[names], group, rounding)
        if rank is not None and len(blocks) > 1 and joined.rank > rank:
            joined, lost = truncated(joined, rank)
            result.errors[_shown(names)] = lost
            blocks = [Block(names, rank, joined.scale)]
        result.pairs.append(joined)
        result.blocks[names] = blocks
    return result


def _shown(names: Sequence[str]) -> str:
    parent = names[0].rpartition(".")[0]
    return names[0] if len(names) == 1 else f"{parent}.({'|'.join(name.rpartition('.')[2] for name in names)})"


def _joined(layer: Layer, group: list[Pair], rounding: bool) -> tuple[Pair, list[Block]]:
    """Return a layer's pair, and what it is made of."""
    group = sorted(group, key=lambda pair: layer.names.index(pair.names[0]))
    first = group[0]
    if first.names == layer.names:
        return first, [Block(first.names, first.rank, first.scale)]
    if all(share_a(pair, first) for pair in group[1:]):
        names = tuple(name for pair in group for name in pair.names)
        rows = tuple(count for pair in group for count in pair.rows)
        b = concatenated([pair.b for pair in group])
        group = [replace(first, names=names, rows=rows, b=b, magnitude=_magnitudes(group))]
    blocks = [Block(pair.names, pair.rank, pair.scale) for pair in group]
    return _assembled(layer, [scaled(pair, first.scale, rounding=rounding) for pair in group]), blocks


def _magnitudes(group: Sequence[Pair]) -> Lazy | None:
    there = [pair.magnitude for pair in group if pair.magnitude is not None]
    if len(there) not in (0, len(group)):
        raise ExportError(f"{_shown(group[0].names)}: some projections of its layer have DoRA's magnitude, others not")
    return concatenated(there) if there else None


def _assembled(layer: Layer, group: Sequence[Pair]) -> Pair:
    """Return pairs as one: their A's one below the other, their B's as blocks."""
    known = {name: count for pair in group for name, count in zip(pair.names, pair.rows, strict=True)}
    rows = layer.rows or _rows(layer, known)
    if any(known.get(name, count) != count for name, count in zip(layer.names, rows, strict=True)):
        raise ExportError(f"{_shown(layer.names)}: the factors' rows {known} are not the model's {rows}")
    if len(known) < len(layer.names) and any(pair.magnitude is not None for pair in group):
        raise ExportError(f"{_shown(layer.names)}: DoRA on some of its projections is none of the layer")
    a = concatenated([pair.a for pair in group])
    starts = dict(zip(layer.names, torch.tensor([0, *rows]).cumsum(0).tolist(), strict=False))

    def blocks() -> Tensor:
        result, column = torch.zeros(sum(rows), a.shape[0], dtype=group[0].b.dtype), 0
        for pair in group:
            b, row = pair.b.read(), 0
            for name, count in zip(pair.names, pair.rows, strict=True):
                start = starts[name]
                result[start : start + count, column : column + pair.rank] = b[row : row + count]
                row += count
            column += pair.rank
        return result

    b = Lazy((sum(rows), a.shape[0]), group[0].b.dtype, blocks)
    return replace(group[0], names=layer.names, rows=rows, a=a, b=b, magnitude=_magnitudes(group))


def _rows(layer: Layer, known: Mapping[str, int]) -> tuple[int, ...]:
    """Return the rows of projections of which some have an adapter; gate and up have as many."""
    missing = [name for name in layer.names if name not in known]
    if missing and len(layer.names) != 2:
        raise ExportError(f"{missing} have no adapter, and their size is not known: the model's configuration says it")
    return tuple(known.get(name, next(iter(known.values()))) for name in layer.names)


def scaled(pair: Pair, scale: float, *, rounding: bool = False) -> Pair:
    """Return the same adapter with another scale, the rest of which goes into B.

    Raises:
        ExportError: that would round, and ``rounding`` is false. Powers of two do not.
    """
    if is_close(pair.scale, scale):
        return replace(pair, scale=scale)
    ratio = pair.scale / scale
    if abs(math.frexp(ratio)[0]) != 0.5 and not rounding:
        raise ExportError(
            f"{_shown(pair.names)}: the scale {pair.scale:g} is to be {scale:g}, as of other layers; multiplying B by "
            f"{ratio:g} rounds its values. rounding=True (--rounding) allows it"
        )

    def change(tensor: Tensor) -> Tensor:
        result = (tensor.double() * ratio).to(tensor.dtype)
        if not rounding and not torch.equal((result.double() / ratio).to(tensor.dtype), tensor):
            raise ExportError(f"{_shown(pair.names)}: B times {ratio:g} leaves the range of {tensor.dtype}")
        return result

    return replace(pair, scale=scale, b=pair.b.map(change))


def padded(pair: Pair, rank: int) -> Pair:
    """Return the same adapter with a larger rank, of which the rest is zero, and the same scale."""
    more = rank - pair.rank
    if not more:
        return pair
    a = pair.a.map(lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 0, more)), (rank, pair.a.shape[1]))
    b = pair.b.map(lambda tensor: torch.nn.functional.pad(tensor, (0, more)), (pair.b.shape[0], rank))
    return replace(pair, a=a, b=b)


def truncated(pair: Pair, rank: int) -> tuple[Pair, float]:
    """Return the nearest pair of a smaller rank, and what was lost, relative to the norm of ``B·A``."""
    a, b = pair.a.read(), pair.b.read()
    whole = svd_of_product(wide(b), wide(a))
    kept = cut(whole, rank)
    root = kept.s.sqrt()
    left, right = (kept.u * root).to(b.dtype), (root.unsqueeze(-1) * kept.v).to(a.dtype)
    norm = float(whole.s.norm())
    lost = float(whole.s[rank:].norm()) / norm if norm else 0.0
    return replace(pair, a=Lazy.of(right), b=Lazy.of(left)), lost


def apart(pairs: Iterable[Pair], record: Mapping[str, Any]) -> tuple[Pair, ...]:
    """Undo what a record says was joined and padded, where the factors are still zero outside of it."""
    found: list[Pair] = []
    try:
        known = {tuple(one["names"]): one["blocks"] for one in record.get("joined", [])}
        for pair in pairs:
            found += _blocks(pair, known[pair.names]) if pair.names in known else [pair]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"the record of a conversion is broken: {error!r}; delete it to read the adapter as it is"
        ) from error
    return tuple(found)


def _blocks(pair: Pair, blocks: Sequence[Any]) -> list[Pair]:
    """Return the pairs that a joined one was made of; itself, if it is not made so any more."""
    bounds = dict(zip(pair.names, _bounds(pair.rows), strict=True))
    made, left, column = [], pair.b.read().clone(), 0
    for block in blocks:
        names, rank = block["names"], block["rank"]
        if type(rank) is not int or not 0 < rank <= pair.rank - column:
            raise ValueError(f"a stretch of {rank!r} is not inside of rank {pair.rank}")
        rows = [bounds[name] for name in names]
        for start, stop in rows:
            left[start:stop, column : column + rank] = 0
        b = concatenated([pair.b.rows(*side) for side in rows]).columns(column, column + rank)
        magnitude = pair.magnitude
        m = None if magnitude is None else concatenated([magnitude.rows(*side) for side in rows])
        counts = tuple(stop - start for start, stop in rows)
        a = pair.a.rows(column, column + rank)
        part = replace(pair, names=tuple(names), rows=counts, a=a, b=b, magnitude=m)
        made.append(_rescaled(part, float(block["scale"])))
        column += rank
    untouched = not left.any() and not pair.a.rows(column, pair.rank).read().any()
    return made if untouched else [pair]


def _rescaled(pair: Pair, scale: float) -> Pair:
    """Return a pair with the scale that it had; as it is, where that rounded and cannot be undone."""
    try:
        return scaled(pair, scale)
    except ExportError:
        return pair


def _bounds(rows: Sequence[int]) -> list[tuple[int, int]]:
    stops = torch.tensor([0, *rows]).cumsum(0).tolist()
    return [*itertools.pairwise(stops)]


__all__ = ["Fused", "Layer", "apart", "fuse", "padded", "scaled", "truncated"]
