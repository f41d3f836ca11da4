"""The form between two systems: pairs of factors under transformers' names, read when they are asked for.

What one system keeps in one fused weight another keeps in several, so a pair has the names of all projections whose
rows its B has, one after the other. Whatever is neither name nor factor (what an adapter's own files said of it) is
carried along, so that going to another system and back gives the same files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.errors import CheckpointError
from lorica.layout.specs import PREFIX, same


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is asked for, and not kept.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: returns it, on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """Return a tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None) -> Lazy:
        """Return what ``change`` makes of it, of another shape or the same."""
        return Lazy(self.shape if shape is None else tuple(shape), self.dtype, lambda: change(self.read()))

    def rows(self, start: int, stop: int) -> Lazy:
        """Return some of its rows."""
        return self.map(lambda tensor: tensor[start:stop], (stop - start, *self.shape[1:]))

    def columns(self, start: int, stop: int) -> Lazy:
        """Return some columns of a matrix."""
        return self.map(lambda tensor: tensor[:, start:stop], (self.shape[0], stop - start))


def concatenated(parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    """Return tensors one after the other along a dimension.

    Raises:
        CheckpointError: they have several dtypes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({part.dtype for part in parts}) > 1:
        raise CheckpointError(f"factors that are to be one have the dtypes {sorted({str(p.dtype) for p in parts})}")
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Lazy(tuple(shape), first.dtype, lambda: torch.cat([part.read() for part in parts], dim))


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Lazy:
    """Return zeros."""
    return Lazy(tuple(shape), dtype, lambda: torch.zeros(tuple(shape), dtype=dtype))


@dataclass(frozen=True)
class Pair:
    """The factors of one linear layer, of several that are one layer elsewhere, or of an embedding.

    Attributes:
        names: full names of the layers in transformers' model, whose rows B has one after the other. Experts are
            numbered (``…mlp.experts.3.gate_proj``), whether transformers stacks their weights or not.
        rows: the number of rows of each.
        a: ``[r, in]``; of an embedding ``[r, V]``.
        b: ``[out, r]``; of an embedding ``[d, r]``.
        scale: ``s`` in ``ΔW = s·B·A``.
        lookup: whether A is looked up by index.
        magnitude: of DoRA, ``[out]``.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    a: Lazy
    b: Lazy
    scale: float
    lookup: bool = False
    magnitude: Lazy | None = None

    def __post_init__(self) -> None:
        shapes_fit = len(self.a.shape) == len(self.b.shape) == 2 and self.a.shape[0] == self.b.shape[1]
        if not shapes_fit or sum(self.rows) != self.b.shape[0] or len(self.rows) != len(self.names):
            raise CheckpointError(
                f"{', '.join(self.names)}: A {self.a.shape} and B {self.b.shape} are no pair on {self.rows} rows"
            )
        if self.magnitude is not None and math.prod(self.magnitude.shape) != self.b.shape[0]:
            raise CheckpointError(f"{', '.join(self.names)}: {self.magnitude.shape} is no magnitude of {self.b.shape}")
        if not math.isfinite(self.scale):
            raise CheckpointError(f"{', '.join(self.names)}: the scale is {self.scale}")

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def name(self) -> str:
        """The name of a pair that has one.

        Raises:
            CheckpointError: it has several.
        """
        if len(self.names) > 1:
            raise CheckpointError(f"{self.names} share one A, and each needs a pair of its own here")
        return self.names[0]

    def split(self) -> list[Pair]:
        """Return a pair for each name; the A is the same."""
        if len(self.names) == 1:
            return [self]
        found, start = [], 0
        for name, count in zip(self.names, self.rows, strict=True):
            magnitude = None if self.magnitude is None else self.magnitude.rows(start, start + count)
            b = self.b.rows(start, start + count)
            found.append(replace(self, names=(name,), rows=(count,), b=b, magnitude=magnitude))
            start += count
        return found

    def renamed(self, change: Callable[[str], str]) -> Pair:
        """Return it with other names."""
        return replace(self, names=tuple(change(name) for name in self.names))


class Tensors(NamedTuple):
    """A tensor of a file, and its name there."""

    name: str
    value: Lazy


@dataclass(frozen=True)
class Adapter:
    """An adapter on its way.

    Attributes:
        where: what it was read from, for messages.
        pairs: its factors.
        config: the values of ``adapter_config.json``; empty where there was none.
        kept: what else its files said, by the name of the system whose word it is (``"bridge"``, ``"spelling"``, …).
        notes: what a user has to know of the reading.
    """

    where: str
    pairs: tuple[Pair, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensors(self) -> Iterator[Tensors]:
        """Yield the tensors of its file in PEFT's names, one pair for each layer."""
        for pair in self.pairs:
            for single in pair.split():
                yield from tensors_of(single)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max((pair.rank for pair in self.pairs), default=0)


def tensors_of(pair: Pair) -> list[Tensors]:
    """Return the tensors of a pair that has one name, as PEFT names them."""
    middle, end = (".lora_embedding_", "") if pair.lookup else (".lora_", ".weight")
    found = [Tensors(f"{PREFIX}{pair.name}{middle}{letter}{end}", f) for letter, f in (("A", pair.a), ("B", pair.b))]
    if pair.magnitude is not None:
        flat = pair.magnitude.map(lambda tensor: tensor.reshape(-1), (pair.b.shape[0],))
        found.append(Tensors(f"{PREFIX}{pair.name}.lora_magnitude_vector", flat))
    return found


def is_same(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors are the same bit for bit."""
    if one is other:
        return True
    return one.shape == other.shape and one.dtype == other.dtype and same(one.read(), other.read())


def share_a(one: Pair, other: Pair) -> bool:
    """Whether two pairs have one A, bit for bit, and one scale."""
    return one.scale == other.scale and is_same(one.a, other.a)


def is_alike(one: Pair, other: Pair) -> bool:
    """Whether two pairs have the same factors, bit for bit, and one scale."""
    return share_a(one, other) and is_same(one.b, other.b)


__all__ = [
    "Adapter",
    "Lazy",
    "Pair",
    "Tensors",
    "concatenated",
    "is_alike",
    "is_same",
    "share_a",
    "tensors_of",
    "zeros",
]
