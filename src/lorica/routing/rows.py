"""The rows of one batch, grouped by adapter.

Layers see the rows of a batch in several forms: one item each, several (beams, or tokens laid one below the other
before experts), or some of them. In all of these the items of a row stand together and the rows keep their order, so
item ``i`` of ``n`` belongs to row ``i // (n / rows)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.errors import AdapterError

#: The name of a row without an adapter.
BASE = "__base__"


class Run(NamedTuple):
    """Neighbouring items of one adapter: ``[start, stop)`` along the first dimension."""

    name: str
    start: int
    stop: int


class Rows:
    """Which adapter each row of a batch has; lives as long as one forward, or one call of ``generate``.

    Args:
        names: an adapter for each row, ``"__base__"`` for none; None: every row has the active ones.
        offsets: adapter → for each row how many tokens, counted from the end, it sees (``[rows]``, whole numbers). One
            that is not here sees all; see :mod:`lorica.variants.alora`.

        lasting: whether many forwards will have these rows, so that it is worth keeping what is made for them.

    Attributes:
        adapters: the names that occur, the base model's among them, in the order of their first rows.
        kept: room for what layers make for these rows and want to find again in the next forward.
    """

    def __init__(
        self, names: Sequence[str] | None, offsets: Mapping[str, Tensor] | None = None, *, lasting: bool = False
    ) -> None:
        self.names = None if names is None else tuple(names)
        self.offsets = dict(offsets or {})
        self.lasting = lasting
        self.adapters = list(dict.fromkeys(names or ()))
        self.kept: dict[Any, Any] = {}
        self._rows = [] if self.names is None else _runs(self.names)
        self._runs: dict[int, list[Run]] = {}
        self._orders: dict[tuple[Any, ...], slice | Tensor] = {}

    def runs(self, items: int) -> list[Run]:
        """Return the runs of neighbours among ``items`` items, from first to last.

        Raises:
            AdapterError: the rows do not divide the items.
        """
        if items not in self._runs:
            each = self.items_per_row(items)
            self._runs[items] = [Run(name, start * each, stop * each) for name, start, stop in self._rows]
        return self._runs[items]

    def items_per_row(self, items: int) -> int:
        """Return how many of ``items`` items belong to each row.

        Raises:
            AdapterError: the rows do not divide the items.
        """
        assert self.names is not None
        if not self.names or items % len(self.names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {items} respectively."
            )
        return items // len(self.names)

    def counts(self, items: int) -> dict[str, int]:
        """Return how many of ``items`` items each adapter has."""
        key = ("counts", items)
        if key not in self.kept:
            counts = dict.fromkeys(self.adapters, 0)
            for name, start, stop in self.runs(items):
                counts[name] += stop - start
            self.kept[key] = counts
        found: dict[str, int] = self.kept[key]
        return found

    def places(self, name: str, items: int, device: torch.device) -> slice | Tensor:
        """Return where the items of one adapter are: a slice where they stand together, or an index."""
        return self.order((name,), items, device)

    def order(self, names: Sequence[str], items: int, device: torch.device) -> slice | Tensor:
        """Return the places of the items of the adapters ``names``, one adapter after the other: a slice where they
        stand together in this order, or an index."""
        key = (*names, items, device)
        if key not in self._orders:
            runs: dict[str, list[Run]] = {name: [] for name in names}
            for run in self.runs(items):
                if run.name in runs:
                    runs[run.name].append(run)
            self._orders[key] = _order([run for name in names for run in runs[name]], device)
        return self._orders[key]

    def index(self, names: Sequence[str], items: int, device: torch.device) -> Tensor:
        """Return the places of the items of the adapters ``names`` as an index; see :meth:`order`."""
        found = self.order(names, items, device)
        return torch.arange(found.start, found.stop, device=device) if isinstance(found, slice) else found

    def reach(self, name: str) -> int:
        """Return the longest of an adapter's offsets."""
        key = ("reach", name)
        if key not in self.kept:
            self.kept[key] = int(self.offsets[name].amax()) if self.offsets[name].numel() else 0
        found: int = self.kept[key]
        return found

    def only(self, name: str) -> Rows:
        """Return the rows of one adapter, for a call that gets these alone."""
        assert self.names is not None
        key = ("only", name)
        if key not in self.kept:
            mine = [row for row, other in enumerate(self.names) if other == name]
            offsets = {a: o[torch.tensor(mine, device=o.device)] for a, o in self.offsets.items() if a == name}
            self.kept[key] = Rows((name,), offsets)
        found: Rows = self.kept[key]
        return found


def _order(runs: Sequence[Run], device: torch.device) -> slice | Tensor:
    if all(before.stop == after.start for before, after in pairwise(runs)):
        return slice(runs[0].start, runs[-1].stop) if runs else slice(0, 0)
    return torch.tensor([item for _, start, stop in runs for item in range(start, stop)], device=device)


def _runs(names: Sequence[str]) -> list[Run]:
    runs: list[Run] = []
    for row, name in enumerate(names):
        if runs and runs[-1].name == name:
            runs[-1] = runs[-1]._replace(stop=row + 1)
        else:
            runs.append(Run(name, row, row + 1))
    return runs


__all__ = ["BASE", "Rows", "Run"]
