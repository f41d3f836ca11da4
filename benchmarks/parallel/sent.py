"""Counts of what ranks send to each other: collectives by name, and the bytes that each rank has to send.

Bytes are those of ring algorithms, the least that can be done: for ``n`` bytes on ``t`` ranks an all-gather,
reduce-scatter or all-to-all sends ``n·(t-1)/t`` per rank, an all-reduce twice that. ``n`` is the size of the whole: the
output of an all-gather, the input of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator → the collective, and which argument is the whole; None: the input of an all-gather, one share of it.
_KNOWN: dict[str, tuple[str, int | None]] = {
    "allreduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "all_reduce": ("all-reduce", 0),
    "all_gather_into_tensor": ("all-gather", None),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "all_to_all_single": ("all-to-all", 0),
}


class Sent(TorchDispatchMode):
    """While it is active, counts what this rank sends. All ranks are on one axis.

    Attributes:
        collectives: name → how often.
        bytes: sent by this rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.bytes = 0

    @property
    def total(self) -> int:
        """How many collectives."""
        return sum(self.collectives.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; distributed tensors show what they do inside."""
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented
        space, name = func._schema.name.split("::")
        if "c10d" in space and not name.startswith(("wait", "_wrap")):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        kind, whole = _KNOWN.get(name.removesuffix("_coalesced"), (name, 0))
        ranks = dist.get_world_size()
        size = _bytes(args[0]) * ranks if whole is None else _bytes(args[whole])
        self.collectives[kind] += 1
        self.bytes += (2 if kind == "all-reduce" else 1) * size * (ranks - 1) // ranks


def _bytes(tensors: object) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


def sent(run: Callable[[], Any]) -> tuple[Any, Sent]:
    """Return what ``run`` returns and what it sent."""
    with Sent() as counted:
        result = run()
    return result, counted
