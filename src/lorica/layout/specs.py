"""How the tensors that an engine keeps come from logical ones, as data: exact both ways, and written as JSON.

An engine may fuse q, k and v, or gate and up; hold key/value heads on several ranks and query heads in an order of its
own, with the output projection's input columns to match; cut a fused weight in strides; share one tensor under two
names. Each of its tensors is described by the logical ones it is made of, one after the other, and the
:class:`~lorica.layout.Layout` of the result. Base weights, their biases and the factors of adapters are all described
so.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.errors import LayoutError
from lorica.files.atomic import write_json
from lorica.files.json import read_json_object
from lorica.layout.layout import At, Layout, Roles

FORMAT = "lorica weight specs"
VERSION = 1
PREFIX = "base_model.model."
_MAX_BYTES = 256 * 1024 * 1024

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """One tensor of an engine.

    Attributes:
        local: its name in the engine's model.
        parts: name and length of the logical tensors it is made of, one after the other.
        roles: the role of each of its dimensions.
        layout: how it lies over ranks, fused and whole.
        along: the role of the dimension along which parts follow one another.
        also: further names of its logical tensor, of which it has one: the A that fused projections share elsewhere.
        absent: parts that have no logical tensor (a projection without an adapter); they are zero.

    Raises:
        LayoutError: the parts do not fit the layout.
    """

    local: str
    parts: tuple[tuple[str, int], ...]
    roles: Roles
    layout: Layout
    along: str = "out"
    also: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names, lengths = [name for name, _ in self.parts], [length for _, length in self.parts]
        everything = [*names, *self.also]
        if not names or len(set(everything)) < len(everything) or (self.also and len(names) > 1):
            raise LayoutError(f"{self.local}: {everything} are not the names of its parts")
        if self.absent and not set(self.absent) < set(names):
            raise LayoutError(f"{self.local}: {self.absent} are not some of its parts {names}")
        if len(names) == 1:
            return
        sizes: Mapping[str, int] = self.layout.sizes
        total = sum(lengths)
        if self.along not in self.roles or min(lengths) < 1 or sizes.get(self.along, total) != total:
            raise LayoutError(f"{self.local}: parts of {total} along {self.along!r} do not make {dict(sizes)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The logical tensors that there are, each by its first name."""
        return tuple(name for name, _ in self.parts if name not in self.absent)

    # ---- from logical to local ---------------------------------------------------------------------------------------

    def to_local(self, state: State, at: At) -> Tensor:
        """Return what the rank ``at`` keeps.

        Args:
            state: logical tensors; others than those of this spec may be there too.
            at: coordinates.

        Raises:
            LayoutError: a part is missing or of another shape, or what is to be one tensor is two.
        """
        for name in self.also:
            if name in state and not same(state[name], state[self.parts[0][0]]):
                raise LayoutError(
                    f"{self.local} is one tensor, and {name} differs from {self.parts[0][0]}: nothing is averaged"
                )
        whole = self._joined(state)
        self._check(whole.shape, f"{self.local}: logical")
        return self.layout.take(whole, self.roles, at)

    def _joined(self, state: State) -> Tensor:
        if missing := [name for name in self.names if name not in state]:
            raise LayoutError(f"{self.local}: the logical state lacks {missing}")
        if len(self.parts) == 1:
            return state[self.parts[0][0]]
        there = {name: state[name] for name in self.names}
        dim, model = self._dim, there[self.names[0]]
        found = []
        for name, length in self.parts:
            shape = (*model.shape[:dim], length, *model.shape[dim + 1 :])
            part = there[name] if name in there else model.new_zeros(shape)
            if part.shape != shape:
                raise LayoutError(f"{name} has the shape {tuple(part.shape)}; for {self.local} it is to be {shape}")
            found.append(part)
        return torch.cat(found, dim)

    @property
    def _dim(self) -> int:
        return self.roles.index(self.along)

    def _check(self, shape: Sequence[int], what: str) -> None:
        sizes: Mapping[str, int] = self.layout.sizes
        wanted = [sizes.get(role, length) for role, length in zip(self.roles, shape, strict=False)]
        if list(shape) != wanted or len(shape) != len(self.roles):
            raise LayoutError(f"{what} shape {tuple(shape)} is not {tuple(wanted)} with the roles {self.roles}")

    # ---- and back ----------------------------------------------------------------------------------------------------

    def to_logical(self, held: Sequence[tuple[At, Tensor]], *, first_copy: bool = False) -> dict[str, Tensor]:
        """Return the logical tensors from what all ranks keep.

        Args:
            held: coordinates and tensor of each rank.
            first_copy: take what the first of them has where two ranks disagree on what both hold.

        Raises:
            LayoutError: a rank is missing, a shape is wrong, or two ranks disagree and ``first_copy`` is false.
        """
        self._check_ranks([at for at, _ in held])
        shape = self._logical_shape(held[0][1])
        for at, tensor in held:
            if tensor.shape != self.layout.local_shape(self.roles, shape, at):
                raise LayoutError(
                    f"{self.local} at {dict(at)} has the shape {tuple(tensor.shape)}, not "
                    f"{tuple(self.layout.local_shape(self.roles, shape, at))}"
                )
        whole = self.layout.assemble(shape, self.roles, reversed(held))  # so that the first is the last to write
        for at, tensor in () if first_copy else held:
            if not same(self.layout.take(whole, self.roles, at), tensor):
                raise LayoutError(f"{self.local}: the copy at {dict(at)} differs from that of another rank")
        if len(self.parts) == 1:
            return dict.fromkeys((self.parts[0][0], *self.also), whole)
        pieces = whole.split([length for _, length in self.parts], self._dim)  # type: ignore[no-untyped-call]
        found = {name: piece.contiguous() for (name, _), piece in zip(self.parts, pieces, strict=True)}
        return {name: found[name] for name in self.names}

    def shapes(self, local: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each logical tensor, given that of what a rank has."""
        sizes: Mapping[str, int] = self.layout.sizes
        whole = tuple(sizes.get(role, length) for role, length in zip(self.roles, local, strict=True))
        if len(self.parts) == 1:
            return dict.fromkeys((self.parts[0][0], *self.also), whole)
        dim, absent = self._dim, set(self.absent)
        return {n: (*whole[:dim], length, *whole[dim + 1 :]) for n, length in self.parts if n not in absent}

    def _check_ranks(self, ranks: Iterable[At]) -> None:
        axes = self.layout.sharded(self.roles)
        there = {tuple(at[axis] for axis in axes) for at in ranks}
        sizes = {cut.axis: cut.size for cut in self.layout.cuts}
        for place in itertools.product(*(range(sizes[axis]) for axis in axes)):
            if place not in there:
                raise LayoutError(f"{self.local}: nothing from the rank at {dict(zip(axes, place, strict=True))}")

    def _logical_shape(self, local: Tensor) -> torch.Size:
        if local.dim() != len(self.roles):
            raise LayoutError(f"{self.local} has the shape {tuple(local.shape)}, and the roles {self.roles}")
        sizes: Mapping[str, int] = self.layout.sizes
        return torch.Size(sizes.get(role, length) for role, length in zip(self.roles, local.shape, strict=True))

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def factors(self, rank: int, *, only: Collection[str] | None = None, prefix: str = PREFIX) -> list[Spec]:
        """Return the specs of A and B of this weight: the A's of its parts one below the other (none is shared).

        A is ``[P·r, in]`` for ``P`` parts, B ``[out, r]``: lorica's own form of factors on a fused weight. A weight
        ``("in", "out")`` is taken for an embedding.

        Args:
            rank: of every part.
            only: names of the projections that have an adapter; None: all.
            prefix: before the logical names, as in files.
        """
        lookup = self.roles == ("in", "out")
        absent = [owner for owner, _ in self.owners if only is not None and owner not in only]
        if len(absent) == len(self.owners):
            return []
        made = []
        for letter, roles, along in (("A", ("rank", "in"), "rank"), ("B", ("out", "rank"), "out")):
            end = f".lora_embedding_{letter}" if lookup else f".lora_{letter}.weight"
            parts = tuple(
                (f"{prefix}{owner}{end}", rank if along == "rank" else length) for owner, length in self.owners
            )
            missing = tuple(f"{prefix}{owner}{end}" for owner in absent)
            made.append(Spec(f"{_owner(self.local)}{end}", parts, roles, self.layout, along, absent=missing))
        return made

    @property
    def owners(self) -> list[tuple[str, int]]:
        """Full name and rows of each projection in this weight, which has factors of its own.

        A weight that is fused in files too is one logical tensor; its projections are the parts of its layout.
        """
        if len(self.parts) > 1 or not self.layout.parts:
            return [(_owner(name), length) for name, length in self.parts]
        parent = _owner(_owner(self.parts[0][0]))
        return [(f"{parent}.{name}" if parent else name, length) for name, length in self.layout.parts]

    # ---- as data -----------------------------------------------------------------------------------------------------

    def to_dict(self, layout: int) -> dict[str, Any]:
        """Return plain JSON values; ``layout`` is the number of its layout in a list."""
        values = {"local": self.local, "parts": self.parts, "roles": self.roles, "layout": layout, "along": self.along}
        return {**values, "also": self.also, "absent": self.absent}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], layouts: Sequence[Layout]) -> Spec:
        """Return the spec that :meth:`to_dict` described."""
        parts = tuple((str(name), int(length)) for name, length in values["parts"])
        named = (tuple(map(str, values[key])) for key in ("roles", "also", "absent"))
        roles, also, absent = named
        return cls(str(values["local"]), parts, roles, layouts[values["layout"]], str(values["along"]), also, absent)


@dataclass(frozen=True)
class WeightSpecs:
    """All tensors of an engine's model.

    Attributes:
        specs: one for each.
        tied: groups of logical names that mean one tensor. In a logical state it has the first of them.

    Raises:
        LayoutError: two tensors have the same name, or are made of the same logical one.
    """

    specs: tuple[Spec, ...]
    tied: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        logical = Counter(name for spec in self.specs for name in (*spec.names, *spec.also))
        for names in (Counter(spec.local for spec in self.specs), logical):
            if twice := [name for name, count in names.items() if count > 1]:
                raise LayoutError(f"in more than one place: {twice[:5]}")
        if strangers := [name for group in self.tied for name in group if name not in logical]:
            raise LayoutError(f"tied, but nowhere: {strangers[:5]}")

    def to_local(self, state: State, at: At) -> dict[str, Tensor]:
        """Return what the rank ``at`` keeps, from a logical state; for errors see :meth:`each_local`."""
        return dict(self.each_local(state, at))

    def each_local(self, state: State, at: At) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of what the rank ``at`` keeps, one after the other.

        Args:
            state: logical tensors. A mapping that reads them when they are asked for is asked for those of one spec at
                a time; ``in`` is to read nothing.
            at: coordinates.

        Raises:
            LayoutError: a tensor is missing, has no place, or does not fit.
        """
        named: dict[str, str] = {}
        for group in self.tied:
            there = [name for name in group if name in state]
            for name in there[1:]:
                if not same(state[name], state[there[0]]):
                    raise LayoutError(f"{name} and {there[0]} are tied and differ")
            named |= dict.fromkeys(group, there[0]) if there else {}
        known = {name for spec in self.specs for name in (*spec.names, *spec.also)}
        if strangers := [name for name in state if name not in known]:
            raise LayoutError(f"{len(strangers)} logical tensors have no place: {strangers[:5]}")
        full = _Named(state, named)
        for spec in self.specs:
            yield spec.local, spec.to_local(full, at)

    def to_logical(self, states: Iterable[tuple[At, State]], *, first_copy: bool = False) -> dict[str, Tensor]:
        """Return the logical state from the states of all ranks.

        Args:
            states: coordinates and tensors of each rank.
            first_copy: take what the first of them has where ranks disagree.

        Raises:
            LayoutError: a tensor or a rank is missing, a tensor has no place, or ranks disagree.
        """
        ranks = list(states)
        for at, state in ranks:
            if wrong := sorted({spec.local for spec in self.specs} ^ state.keys()):
                raise LayoutError(f"the rank at {dict(at)}: missing or without a place are {wrong[:5]}")
        found: dict[str, Tensor] = {}
        for spec in self.specs:
            found |= spec.to_logical([(at, state[spec.local]) for at, state in ranks], first_copy=first_copy)
        for leader, *others in self.tied:
            for name in others:
                if not same(found.pop(name), found[leader]):
                    raise LayoutError(f"{name} and {leader} are tied and differ")
        return found

    def factors(
        self, rank: int | Mapping[str, int], *, only: Collection[str] | None = None, prefix: str = PREFIX
    ) -> WeightSpecs:
        """Return the specs of an adapter's factors on these weights.

        Args:
            rank: of all, or of each projection by its full name.
            only: full names of the projections that have an adapter; None: those that ``rank`` names, or all.
            prefix: before the logical names, as in files.

        Raises:
            LayoutError: parts of one weight have different ranks.
        """
        chosen = set(rank) if only is None and not isinstance(rank, int) else only
        made: list[Spec] = []
        for spec in self.specs:
            if {"in", "out"} != set(spec.roles):
                continue
            owners = [owner for owner, _ in spec.owners if chosen is None or owner in chosen]
            ranks = {rank if isinstance(rank, int) else rank[owner] for owner in owners}
            if len(ranks) > 1:
                raise LayoutError(f"{spec.local}: its parts {owners} have the ranks {sorted(ranks)}; one is needed")
            if ranks:
                made += spec.factors(ranks.pop(), only=chosen, prefix=prefix)
        return WeightSpecs(tuple(made))

    def __iter__(self) -> Iterator[Spec]:
        return iter(self.specs)

    # ---- as data -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a layout that many tensors have is there once."""
        layouts = {spec.layout: None for spec in self.specs}
        numbers = {layout: number for number, layout in enumerate(layouts)}
        specs = [spec.to_dict(numbers[spec.layout]) for spec in self.specs]
        described = [layout.to_dict() for layout in layouts]
        return {"format": FORMAT, "version": VERSION, "layouts": described, "specs": specs, "tied": self.tied}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WeightSpecs:
        """Return what :meth:`to_dict` described.

        Raises:
            LayoutError: the values describe none.
        """
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise LayoutError(f"not {FORMAT!r} of version {VERSION}")
        try:
            layouts = [Layout.from_dict(layout) for layout in values["layouts"]]
            specs = tuple(Spec.from_dict(spec, layouts) for spec in values["specs"])
            tied = tuple(tuple(map(str, group)) for group in values["tied"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, LayoutError):
                raise
            raise LayoutError(f"not {FORMAT}: {error!r}") from error
        return cls(specs, tied)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> WeightSpecs:
        """Read what :meth:`write` wrote.

        Raises:
            CheckpointError: the file is no JSON object.
            LayoutError: it describes no specs.
        """
        return cls.from_dict(read_json_object(os.fspath(path), limit=_MAX_BYTES))


class _Named(Mapping[str, Tensor]):
    """A logical state in which tied tensors have all of their names."""

    def __init__(self, state: State, named: Mapping[str, str]) -> None:
        self._state, self._named = state, named

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._named.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self._state or name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._state), **self._named})

    def __len__(self) -> int:
        return len(self._state.keys() | self._named.keys())


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit for bit."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


__all__ = ["Spec", "WeightSpecs", "same"]
