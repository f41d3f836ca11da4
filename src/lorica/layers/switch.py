"""Which adapters of a model are on, in one object that all its layers share, and which rows a batch has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorica.routing import Rows


class Switch:
    """The active adapters of one model. Every layer of the model holds the same object, so that switching adapters
    does not visit the layers.

    Attributes:
        active: names of the adapters that take part in a forward, in their order.
        enabled: whether adapters take part at all.
        rows: which adapter each row of the batch has, or which tokens it sees, while a forward that says so runs.
        pending: whether a backward pass gave partial gradients that were not summed over ranks since.
        agreed: whether the ranks have compared their adapters since the last change.
    """

    def __init__(self, active: tuple[str, ...] = ()) -> None:
        self.active = active
        self.enabled = True
        self.rows: Rows | None = None
        self.pending = False
        self.agreed = False

    def gradients_changed(self, gradient: object) -> None:
        """Note that a backward pass went through a layer that lies over several ranks (a hook on its output)."""
        self.pending = True

    @contextmanager
    def routed(self, rows: Rows | None) -> Iterator[None]:
        """Let the layers know the rows inside a ``with`` block, whatever happens in it."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before
