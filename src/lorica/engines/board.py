"""What ranks tell each other beside their collectives: notes in the store through which they found each other.

A collective waits until all ranks come, and says of one that will not come no more than that. The store answers alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist

from lorica.errors import RankError


class Board:
    """Notes of all ranks about one thing that they do together.

    Args:
        store: of the ranks' process group.
        rank: this one.
        size: how many there are.
        name: what they do. Each time it is done has notes of its own, as long as all ranks do it equally often.
    """

    def __init__(self, store: Any, rank: int, size: int, name: str) -> None:
        self.rank, self.size = rank, size
        number = store.add(f"lorica/{name}/{rank}", 1)
        self._store, self._prefix = store, f"lorica/{name}/{number}"

    @classmethod
    def of_all(cls, name: str) -> Board | None:
        """Return the board of all ranks; None on one process, or where no store is there."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        keeps = store is not None and dist.get_backend() not in ("fake", "mpi")  # those only act as if, or have none
        return cls(store, dist.get_rank(), dist.get_world_size(), name) if keeps else None

    def post(self, topic: str, text: str) -> None:
        """Leave a note of this rank, in place of an earlier one."""
        self._store.set(f"{self._prefix}/{topic}/{self.rank}", text)

    def posted(self, topic: str) -> dict[int, str]:
        """Return the notes that are there, by rank."""
        names = {rank: f"{self._prefix}/{topic}/{rank}" for rank in range(self.size)}
        there = list(names)
        if not self._store.check(list(names.values())):
            there = [rank for rank, name in names.items() if self._store.check([name])]
        notes = self._store.multi_get([names[rank] for rank in there]) if there else []
        return {rank: note.decode() for rank, note in zip(there, notes, strict=True)}

    def first(self, topic: str, text: str) -> None:
        """Leave a note unless one of the same topic is there, whoever wrote it."""
        self._store.compare_set(f"{self._prefix}/{topic}", "", text)

    def read(self, topic: str) -> str | None:
        """Return what :meth:`first` left."""
        name = f"{self._prefix}/{topic}"
        return self._store.get(name).decode() if self._store.check([name]) else None

    def own_connection(self) -> Board:
        """Return the same board for another thread, which does not wait where this one does."""
        other = copy.copy(self)
        if hasattr(self._store, "clone"):  # newer than the oldest torch that lorica knows
            other._store = self._store.clone()
        return other


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another rank died or did not answer in time."""
    if not isinstance(error, RuntimeError) or isinstance(error, RankError):
        return False
    said = str(error)
    return isinstance(error, dist.DistError) or any(sign in said for sign in _SIGNS)


_SIGNS = ("Connection closed by peer", "Connection reset", "Timed out waiting", "gloo/transport", "NCCL", "Broken pipe")

__all__ = ["Board", "is_lost"]
