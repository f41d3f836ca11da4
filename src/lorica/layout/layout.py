"""The pure description of how one logical weight lies over ranks, and everything that follows from it.

A weight has dimensions with *roles*: ``"out"``, ``"in"`` and, where experts are stacked, ``"expert"``. A factor has
roles too: A of a linear ``("rank", "in")``, B ``("out", "rank")``. A cut of a role cuts every tensor that has it, the
same way; a tensor that lacks it is replicated over the cut's axis, sees only a share of the sum there, and so has a
partial gradient. That one rule gives placements, slices and reductions of column, row, vocabulary and expert layers
alike (of an embedding, the vocabulary is its ``"in"``: a lookup is a product with one-hot rows).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.errors import LayoutError
from lorica.layout.cuts import DIMS, Cut, Held

#: The role of each dimension of a tensor. Roles that no cut names are whole.
Roles = tuple[str, ...]
#: Coordinate on each mesh axis.
At = Mapping[str, int]


class Box(NamedTuple):
    """A rectangular piece of a tensor: where it lies in the local one and where in the logical one."""

    local: tuple[slice, ...]
    logical: tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How one logical weight lies over ranks.

    Attributes:
        sizes: logical length of each dimension of the weight that may be cut.
        cuts: at most one for each dimension and for each axis.
        parts: names and lengths of the projections fused along ``"out"``, one after the other; each keeps factors of
            its own. Empty: one.
        sequence: axes whose ranks see different tokens of one sequence; gradients of replicated tensors add up.
        data: axes whose ranks see different batches; gradients are averaged.
        batches: how many different batches the ranks of the cut axes bring together, each sending its tokens to the
            rank that has their expert. Gradients are then sums over these batches, and are divided by their number.
        groups: lengths of the runs of rows, one after the other, of which some lie on more ranks than others, where
            the weight is one part: queries, keys and values that are fused in the logical weight as well.
    """

    sizes: Mapping[str, int]
    cuts: tuple[Cut, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()
    sequence: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    batches: int = 1
    groups: tuple[int, ...] = ()
    _by_dim: dict[str, Cut] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not all(length > 0 for length in self.sizes.values()):
            raise LayoutError(f"sizes {dict(self.sizes)}: every dimension needs a positive length")
        for cut in self.cuts:
            self._add(cut)
        if self.batches < 1:
            raise LayoutError(f"batches={self.batches}: a gradient is the sum over at least one batch")
        if len({cut.axis for cut in self.cuts}) < len(self.cuts):
            raise LayoutError(f"an axis cuts two dimensions: {[(cut.axis, cut.dim) for cut in self.cuts]}")
        self._check_parts()
        self._check_groups()

    def _add(self, cut: Cut) -> None:
        cut.check(evenly=cut.dim != "out" or not (self.parts or self.groups))  # those are checked one by one
        if cut.dim in self._by_dim:
            raise LayoutError(f"{cut.dim!r} is cut twice, over {self._by_dim[cut.dim].axis!r} and {cut.axis!r}")
        if cut.dim not in DIMS or cut.dim not in self.sizes or cut.total != self.sizes[cut.dim]:
            raise LayoutError(
                f"the cut over {cut.axis!r} has {cut.total} positions, {cut.dim!r} has {self.sizes.get(cut.dim)}"
            )
        if cut.dim == "in" and cut.copies > 1:
            raise LayoutError(
                f"the cut over {cut.axis!r} has copies of 'in': the sum of outputs would count them twice"
            )
        self._by_dim[cut.dim] = cut

    def _check_parts(self) -> None:
        if not self.parts:
            return
        names = [name for name, _ in self.parts]
        if len(set(names)) < len(names) or any(length <= 0 for _, length in self.parts):
            raise LayoutError(f"the parts {self.parts} need names of their own and positive lengths")
        if sum(length for _, length in self.parts) != self.sizes["out"]:
            raise LayoutError(f"the parts {self.parts} do not add up to {self.sizes['out']} rows")
        for index in range(len(self.parts)):
            self.part(index)

    def _check_groups(self) -> None:
        if not self.groups:
            return
        if self.parts or min(self.groups) <= 0 or sum(self.groups) != self.sizes["out"]:
            raise LayoutError(f"the groups {self.groups} do not add up to {self.sizes['out']} rows of one part")
        start = 0
        for length in self.groups:
            for cut in self.cuts:
                if cut.dim == "out":
                    cut.within(start, start + length).check()
            start += length

    def __hash__(self) -> int:
        sizes = tuple(sorted(self.sizes.items()))
        return hash((sizes, self.cuts, self.parts, self.sequence, self.data, self.batches, self.groups))

    # ---- where things lie ------------------------------------------------------------------------------------------

    def held(self, role: str, length: int, at: At) -> Held:
        """Return the intervals of a logical dimension of ``length`` that the rank ``at`` holds, in local order."""
        cut = self._by_dim.get(role)
        return ((0, length),) if cut is None else cut.held[at[cut.axis]]

    def local_shape(self, roles: Roles, shape: Sequence[int], at: At) -> torch.Size:
        """Return the shape of what the rank ``at`` holds of a logical tensor of ``shape``."""
        return torch.Size(
            sum(stop - start for start, stop in self.held(role, length, at))
            for role, length in zip(roles, shape, strict=True)
        )

    def boxes(self, roles: Roles, shape: Sequence[int], at: At) -> list[Box]:
        """Return the rectangular pieces of a logical tensor of ``shape`` that the rank ``at`` holds."""
        found = [Box((), ())]
        for role, length in zip(roles, shape, strict=True):
            place, sides = 0, []
            for start, stop in self.held(role, length, at):
                sides.append((slice(place, place + stop - start), slice(start, stop)))
                place += stop - start
            found = [Box((*box.local, local), (*box.logical, logical)) for box in found for local, logical in sides]
        return found

    def in_order(self, roles: Roles, at: At) -> bool:
        """Whether what the rank ``at`` holds of a tensor with these roles lies as in the logical one, without gaps."""
        return all(len(cut.held[at[cut.axis]]) < 2 for cut in self.cuts if cut.dim in roles)

    def take(self, logical: Tensor, roles: Roles, at: At) -> Tensor:
        """Return what the rank ``at`` holds of a logical tensor, as a tensor of its own."""
        result = logical
        for dim, role in enumerate(roles):
            if role in self._by_dim:
                intervals = self.held(role, logical.shape[dim], at) or ((0, 0),)
                result = torch.cat([result.narrow(dim, start, stop - start) for start, stop in intervals], dim)
        return result.clone() if result is logical else result.contiguous()

    def put(self, logical: Tensor, local: Tensor, roles: Roles, at: At) -> None:
        """Write what the rank ``at`` holds into the logical tensor."""
        for box in self.boxes(roles, logical.shape, at):
            logical[box.logical] = local[box.local]

    def assemble(self, shape: Sequence[int], roles: Roles, held: Iterable[tuple[At, Tensor]]) -> Tensor:
        """Return the logical tensor of ``shape`` from what every rank holds."""
        result: Tensor | None = None
        for at, local in held:
            if result is None:
                result = local.new_empty(tuple(shape))
            self.put(result, local, roles, at)
        if result is None:
            raise LayoutError("nothing to assemble")
        return result

    # ---- what is replicated, and what is partial --------------------------------------------------------------------

    def cut_of(self, role: str) -> Cut | None:
        """Return the cut of a dimension, or None."""
        return self._by_dim.get(role)

    def sharded(self, roles: Roles) -> tuple[str, ...]:
        """Return the axes that cut a tensor with these roles."""
        return tuple(cut.axis for cut in self.cuts if cut.dim in roles)

    def summed(self, roles: Roles) -> tuple[str, ...]:
        """Return the axes over which the gradient of a tensor with these roles has to be summed.

        These are the axes that cut a dimension which the tensor lacks, those that hold copies of its rows, and those
        whose ranks see different tokens of a sequence (unless they cut this tensor: then its rank has seen them all).
        """
        cuts = [cut.axis for cut in self.cuts if cut.dim not in roles or cut.copies > 1]
        sharded = self.sharded(roles)
        return tuple(dict.fromkeys([*cuts, *(axis for axis in self.sequence if axis not in sharded)]))

    def averaged(self) -> tuple[str, ...]:
        """Return the axes over which every gradient has to be averaged."""
        return self.data

    def copies(self, roles: Roles) -> int:
        """Return how many ranks hold each element of a tensor with these roles (at most), on the axes that cut it."""
        count = 1
        for cut in self.cuts:
            count *= cut.copies if cut.dim in roles else 1
        return count

    def shares(self) -> int:
        """Return of how many ranks' outputs the base layer's output is the sum (row and vocabulary layers).

        Where the axis divides the tokens too, the output is that of this rank's tokens, summed already.
        """
        cut = self._by_dim.get("in")
        return 1 if cut is None or cut.axis in self.sequence else cut.size

    # ---- fused projections -----------------------------------------------------------------------------------------

    def part_bounds(self) -> list[tuple[str, int, int]]:
        """Return name, first row and last row (exclusive) of each part in the logical weight."""
        bounds, start = [], 0
        for name, length in self.parts:
            bounds.append((name, start, start + length))
            start += length
        return bounds

    def part_rows(self, at: At) -> list[Held]:
        """Return, for each part, the intervals of local rows that belong to it, in local order."""
        local: list[list[tuple[int, int]]] = [[] for _ in self.parts]
        place = 0
        for start, stop in self.held("out", self.sizes["out"], at):
            for index, (_, first, last) in enumerate(self.part_bounds()):
                low, high = max(start, first), min(stop, last)
                if low < high:
                    local[index].append((place + low - start, place + high - start))
            place += stop - start
        return [tuple(rows) for rows in local]

    def part(self, index: int) -> Layout:
        """Return the layout of one part alone, as the weight it was before it was fused."""
        _, first, last = self.part_bounds()[index]
        cuts = [cut.within(first, last) if cut.dim == "out" else cut for cut in self.cuts]
        return Layout({**self.sizes, "out": last - first}, tuple(cuts), (), self.sequence, self.data, self.batches)

    def as_one(self) -> Layout:
        """Return the layout of the same weight where the projections fused in it are one part."""
        lengths = tuple(length for _, length in self.parts) or self.groups
        return replace(self, parts=(), groups=lengths)

    # ---- as data -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain JSON values."""
        return {
            "sizes": dict(self.sizes),
            "cuts": [{"axis": cut.axis, "dim": cut.dim, "held": cut.held} for cut in self.cuts],
            "parts": self.parts,
            "sequence": self.sequence,
            "data": self.data,
            "batches": self.batches,
            "groups": self.groups,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """Return the layout that :meth:`to_dict` described.

        Raises:
            LayoutError: the values describe none.
        """
        try:
            cuts = tuple(
                Cut(
                    str(cut["axis"]),
                    cut["dim"],
                    tuple(tuple((int(a), int(b)) for a, b in held) for held in cut["held"]),
                )
                for cut in values["cuts"]
            )
            parts = tuple((str(name), int(length)) for name, length in values["parts"])
            sizes = {key: int(size) for key, size in values["sizes"].items()}
            batches, groups = int(values.get("batches", 1)), tuple(int(size) for size in values.get("groups", ()))
            return cls(sizes, cuts, parts, _names(values["sequence"]), _names(values["data"]), batches, groups)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LayoutError(f"not a layout: {error!r}") from error


def _names(values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError(f"{values!r} is not a list of axes")
    return tuple(str(name) for name in values)
