"""Which attention heads a rank holds when there are fewer key/value heads than ranks, or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorica.errors import LayoutError
from lorica.layout.cuts import Cut, Held, held_by_slots


@dataclass(frozen=True)
class HeadOrder:
    """Query heads and key/value heads of each rank, in local order.

    Attributes:
        query: for each rank, its query heads.
        kv: for each rank, its key/value heads; a head may lie on several ranks.
    """

    query: tuple[tuple[int, ...], ...]
    kv: tuple[tuple[int, ...], ...]

    def query_cut(self, axis: str, head_dim: int, *, dim: Literal["out", "in"] = "out") -> Cut:
        """Return the cut of the query projection's rows, or (``dim="in"``) of the output projection's columns."""
        return Cut(axis, dim, tuple(held_by_slots(heads, head_dim) for heads in self.query))

    def kv_cut(self, axis: str, head_dim: int) -> Cut:
        """Return the cut of the key or value projection's rows."""
        return Cut(axis, "out", tuple(held_by_slots(heads, head_dim) for heads in self.kv))

    def qkv_cut(self, axis: str, head_dim: int) -> Cut:
        """Return the cut of q, k and v fused into one weight: q rows, then k rows, then v rows, on every rank."""
        heads, kv_heads = _count(self.query), _count(self.kv)
        held: list[Held] = []
        for query, kv in zip(self.query, self.kv, strict=True):
            k = held_by_slots(kv, head_dim, heads * head_dim)
            v = held_by_slots(kv, head_dim, (heads + kv_heads) * head_dim)
            held.append((*held_by_slots(query, head_dim), *k, *v))
        return Cut(axis, "out", tuple(held))


def _count(heads: tuple[tuple[int, ...], ...]) -> int:
    return 1 + max(head for held in heads for head in held)


def grouped_heads(
    ranks: int,
    heads: int,
    kv_heads: int,
    *,
    multiplier: int | None = None,
    order: Literal["strided", "neighbours"] = "strided",
) -> HeadOrder:
    """Return the heads of every rank for grouped-query attention.

    Each KV head is held by ``m = multiplier`` ranks, each with its share of the head's query group. Slot ``u`` (rank
    ``rank·n + j``, ``n`` slots to a rank) holds KV head ``u mod K`` as copy ``u div K`` (``"strided"``,
    neuronx-distributed's order), or head ``u div m`` as copy ``u mod m`` (``"neighbours"``).

    Args:
        ranks: size of the tensor-parallel axis.
        heads: query heads.
        kv_heads: key/value heads.
        multiplier: copies of each KV head; None: as few as the ranks need.
        order: where the copies lie.

    Raises:
        LayoutError: the heads cannot be divided so.
    """
    if min(ranks, heads, kv_heads) < 1 or heads % kv_heads:
        raise LayoutError(f"{ranks} ranks: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    m = max(1, ranks // kv_heads) if multiplier is None else multiplier
    group = heads // kv_heads
    if m < 1 or ranks % m or (kv_heads * m) % ranks or group % m:
        raise LayoutError(
            f"{heads} query and {kv_heads} key/value heads do not divide over {ranks} ranks with {m} copies of each "
            f"key/value head: {ranks} must be a multiple of {m}, {kv_heads}·{m} one of {ranks}, and the group of "
            f"{group} query heads one of {m}"
        )
    slots, share = kv_heads * m // ranks, group // m
    if order == "neighbours" and min(slots, m) > 1:
        raise LayoutError(f"{slots} slots to a rank, copies side by side: a rank would hold a key/value head twice")
    query, kv = [], []
    for rank in range(ranks):
        mine = range(rank * slots, (rank + 1) * slots)
        places = [(u % kv_heads, u // kv_heads) if order == "strided" else (u // m, u % m) for u in mine]
        kv.append(tuple(head for head, _ in places))
        query.append(tuple(head * group + copy * share + i for head, copy in places for i in range(share)))
    return HeadOrder(tuple(query), tuple(kv))
