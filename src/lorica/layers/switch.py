"""Which adapters of a model are on, in one object that all its layers share, and which rows a batch has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch

from lorica.layers.turns import Turns
from lorica.routing import Rows


class Switch:
    """The active adapters of one model. Every layer of the model holds the same object, so that switching adapters
    does not visit the layers.

    Attributes:
        active: names of the adapters that take part in a forward, in their order.
        enabled: whether adapters take part at all.
        pending: whether a backward pass gave partial gradients that were not summed over ranks since.
        agreed: whether the ranks have compared their adapters since the last change.
        turns: which threads compute with the model, and which one changes it.
        routing: the threads that have rows; where there are none, :attr:`rows` need not be asked for.
    """

    def __init__(self, active: tuple[str, ...] = ()) -> None:
        self.active = active
        self.enabled = True
        self.pending = False
        self.agreed = False
        self._begin()

    def _begin(self) -> None:
        self.turns = Turns()
        self.routing: set[int] = set()
        self._here = _Here()
        self._off = 0  # blocks that have turned the adapters off
        self._before = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("active", "enabled", "pending", "agreed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()  # a copy has turns of its own, and nobody computes with it yet

    def gradients_changed(self, gradient: object) -> None:
        """Note that a backward pass went through a layer that lies over several ranks (a hook on its output)."""
        self.pending = True

    @property
    def rows(self) -> Rows | None:
        """Which adapter each row of the batch has, or which tokens it sees, while this thread runs a forward that says
        so; None elsewhere. In a backward pass, those of the thread that called it."""
        found = self._here.rows
        if found is not None or torch.compiler.is_compiling() or not self.routing:
            return found
        return _told().get(id(self)) if torch._C._current_graph_task_id() != -1 else None

    @contextmanager
    def routed(self, rows: Rows | None) -> Iterator[None]:
        """Let the layers know the rows in this thread inside a ``with`` block, whatever happens in it."""
        here, traced = self._here, torch.compiler.is_compiling()
        before, here.rows = here.rows, rows
        told = {} if traced else self._tell(rows)
        try:
            yield
        finally:
            here.rows = before
            if not traced:
                self._tell(before, told)

    def _tell(self, rows: Rows | None, told: dict[int, Rows | None] | None = None) -> dict[int, Rows | None]:
        """Note that this thread has rows or none, also for autograd's threads, and return what these were told before.

        Args:
            rows: of this thread.
            told: what to tell them; None: these rows too.
        """
        if rows is None:
            self.routing.discard(get_ident())
        else:
            self.routing.add(get_ident())
        before = _told()
        torch._C._stash_obj_in_tls(_KEY, {**before, id(self): rows} if told is None else told)
        return before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn all adapters off, for all threads, inside a ``with`` block; of several that overlap the last one that
        is left turns them on again."""
        with self.turns.writing():
            if not self._off:
                self._before = self.enabled
            self._off += 1
            self.enabled = False
        try:
            yield
        finally:
            with self.turns.writing():
                self._off -= 1
                if not self._off:
                    self.enabled = self._before


class _Here(threading.local):
    """What one thread's forward has."""

    def __init__(self) -> None:
        self.rows: Rows | None = None  # a default of the class would be all that compilers see


# Where layers run again in a backward pass on an accelerator, a thread of autograd's runs them. It has what the thread
# that called the pass has put into this store of torch's.
_KEY = "lorica.rows"


def _told() -> dict[int, Rows | None]:
    """Return the rows of this thread, or of the one that called the backward pass, by the identities of switches."""
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else {}
