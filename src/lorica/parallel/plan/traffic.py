"""What is sent between ranks, and what is alive in memory, while a piece of code runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]

#: Of a ring algorithm: bytes that each of n ranks sends, for one byte of the whole tensor.
_RING: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
}
#: Operator → collective, and which argument is the whole tensor (of a functional gather: this rank's share of it).
_OPERATORS = {
    "allreduce_": ("all_reduce", 0, False),
    "all_reduce": ("all_reduce", 0, False),
    "all_reduce_": ("all_reduce", 0, False),
    "_allgather_base_": ("all_gather", 0, False),
    "allgather_": ("all_gather", 0, False),
    "all_gather_into_tensor": ("all_gather", 0, True),
    "_reduce_scatter_base_": ("reduce_scatter", 1, False),
    "reduce_scatter_": ("reduce_scatter", 1, False),
    "reduce_scatter_tensor": ("reduce_scatter", 0, False),
    "alltoall_base_": ("all_to_all", 1, False),
    "all_to_all_single": ("all_to_all", 0, False),
    "broadcast_": ("broadcast", 0, False),
}


def ring(collective: str, ranks: int, size: float) -> float:
    """Return the bytes that one of ``ranks`` sends in a collective on ``size`` bytes, by a ring algorithm."""
    return _RING[collective](ranks) * size


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives of this rank, by axis, and the bytes it sends in them.

    Args:
        axes: name of each process group → the axis it belongs to; what is sent over others counts as ``"other"``.
        scalar: what the code is told when it reads a number out of a tensor without values; None: nothing is replaced.

    Attributes:
        calls: (axis, collective) → how often.
        sent: (axis, collective) → bytes.
        live: bytes of the tensors made since and still there.
        peak: the most there were.
    """

    def __init__(self, axes: Mapping[str, str], scalar: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes, self._scalar = axes, scalar
        self.calls: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operator."""
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # it comes again, with what it does inside
        name = func._schema.name.partition("::")[2]
        if func.namespace.startswith(("c10d", "_c10d")) and name in _OPERATORS:
            self._count(name, args)
        if self._scalar is not None and func is torch.ops.aten._local_scalar_dense.default:
            return self._scalar(args[0])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._made(tensor)
        return result

    def _count(self, operator: str, args: Any) -> None:
        collective, place, share = _OPERATORS[operator]
        group = next(found for arg in reversed(args) if (found := _group_name(arg)) is not None)
        ranks = _resolve(group).size()
        size = sum(t.numel() * t.element_size() for t in tree_leaves(args[place]) if isinstance(t, Tensor))
        key = (self._axes.get(group, "other"), collective)
        self.calls[key] += 1
        self.sent[key] += round(ring(collective, ranks, size * (ranks if share else 1)))

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _group_name(argument: Any) -> str | None:
    if isinstance(argument, str):
        try:
            _resolve(argument)
        except (LookupError, RuntimeError, ValueError):
            return None
        return argument
    if isinstance(argument, torch.ScriptObject):
        try:
            return str(dist.ProcessGroup.unbox(argument).group_name)
        except (RuntimeError, TypeError):
            return None  # another object, such as the reduction's operator
    return None


__all__ = ["Traffic", "ring"]
