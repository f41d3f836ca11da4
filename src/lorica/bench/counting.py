"""Counts of what a call does: FLOPs, kernels, bytes moved, bytes saved for backward, peak bytes. None of them jitters.

All are taken from outside, at torch's dispatcher, with the same rules for every side:

- **kernels**: operators that read or write tensor memory. Views and bare allocations are none.
- **bytes moved**: the sizes of the distinct tensors an operator reads, plus those of the ones it writes. Elements that
  an expanded tensor repeats count once. What a kernel does inside (a temporary, a second pass) cannot be seen.
- **saved bytes**: distinct storages that autograd keeps for backward, without parameters and buffers of the model.
- **peak bytes**: the most that was alive at once of the storages that operators allocated during the call. Memory
  mapped from a file, and what a kernel allocates for itself, cannot be seen.
- **FLOPs**: by the formulas of ``torch.utils.flop_counter``, so products and attention only; with the in-place products
  it leaves out.

Nothing is attached to modules for it. What autograd saves is seen through hooks on saved tensors, in a call of its own,
since code may take another way under such hooks.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

#: The quantities of :func:`count`, in the order of the tables.
QUANTITIES = ("FLOPs", "kernels", "bytes moved", "saved bytes", "peak bytes")

_ALLOCATE = {"empty", "empty_strided", "empty_like", "empty_permuted", "new_empty", "new_empty_strided", "resize_"}
# In-place operators that do not read what they write over.
_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}


def _product_flops(c: Any, a: Any, b: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # Shapes, not tensors: [..., m, k] times [..., k, n].
    return 2 * int(math.prod(a)) * int(b[-1])


def _grouped_flops(a: Any, b: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # [rows, k] times [experts, k, n], or [m, rows] times [rows, n] for each expert: a row meets one expert's matrix.
    return 2 * int(math.prod(a)) * int(b[-1])


# What torch's counter lets go free: the in-place forms of products that it knows, and the grouped product of experts.
_FURTHER_PRODUCTS: dict[Any, Any] = {
    torch.ops.aten.addmm_: shape_wrapper(_product_flops),  # type: ignore[no-untyped-call]
    torch.ops.aten.baddbmm_: shape_wrapper(_product_flops),  # type: ignore[no-untyped-call]
}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _FURTHER_PRODUCTS[torch.ops.aten._grouped_mm] = shape_wrapper(_grouped_flops)  # type: ignore[no-untyped-call]


def tensor_bytes(tensor: Tensor) -> int:
    """Return the size of the elements that a tensor really has; those that a stride of 0 repeats count once."""
    distinct = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(distinct) * tensor.element_size()


def _tensors(values: object) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            yield leaf


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    # The address alone does not do: a matrix and its first row start at the same place.
    return sum({(t.data_ptr(), *t.shape, *t.stride()): tensor_bytes(t) for t in tensors}.values())


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels, the bytes they move, and the peak of what they allocated, while it is active.

    Attributes:
        kernels: operator name → how often it ran.
        flops: those of products and attention.
        bytes_moved: bytes read plus bytes written.
        live_bytes: bytes allocated under this mode that are still alive.
        peak_bytes: the most that ``live_bytes`` has been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: dict[str, int] = {}
        self.flops = 0
        self.bytes_moved = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
        old = {_key(tensor) for tensor in inputs}
        for tensor in outputs:
            if _key(tensor) not in old:
                self._allocated(tensor)
        if func.overloadpacket.__name__ not in _ALLOCATE:
            self._ran(func, args, kwargs, outputs, old)
        return out

    def _ran(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor], old: set[int]) -> None:
        read, written = _arguments(func, args, kwargs)
        fresh = [tensor for tensor in outputs if _key(tensor) not in old]
        if outputs and not fresh and not written:
            return  # a view in all but its schema, such as _unsafe_view
        if not (read or written or fresh):
            return  # nothing but meta tensors
        name, packet = func.overloadpacket.__name__, func.overloadpacket
        formula = _FURTHER_PRODUCTS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else tuple(outputs))
        self.kernels[name] = self.kernels.get(name, 0) + 1
        self.bytes_moved += _distinct_bytes(read) + _distinct_bytes([*written, *fresh])

    def _allocated(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        self.live_bytes -= self._alive.pop(key, 0)


def _arguments(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors an operator reads and those of its arguments that it writes."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    overwrites = func.overloadpacket.__name__ in _OVERWRITE
    schema = func._schema.arguments
    named = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    for argument, value in named:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += _tensors(value)
        if not is_written or not (argument.is_out or overwrites):
            read += _tensors(value)
    return read, written


class SavedBytes:
    """Sums the distinct storages that autograd saves while it is active.

    Args:
        model: its parameters and buffers do not count: they stay whether saved or not.

    Attributes:
        total: bytes saved so far.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        own = [] if model is None else [*model.parameters(), *model.buffers()]
        self._own = {_key(tensor) for tensor in own if not tensor.is_meta}
        self._alive: set[int] = set()
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key not in self._own and key not in self._alive:
            self._alive.add(key)
            self.total += storage.nbytes()
            # Another storage may come to lie at its address, and be saved too.
            weakref.finalize(storage, self._alive.discard, key).atexit = False
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def count(
    run: Callable[[], object], model: nn.Module | None = None, *, reset: Callable[[], object] = lambda: None
) -> dict[str, int]:
    """Call ``run`` twice and return its counts, by the names in :data:`QUANTITIES`.

    Args:
        run: what is counted; its result is thrown away only after the counting.
        model: whose parameters and buffers are not saved bytes.
        reset: runs before each call and is not counted.
    """
    kernels, saved = KernelCounter(), SavedBytes(model)
    reset()
    with kernels:
        result = run()
    del result
    reset()
    with saved:
        result = run()
    del result
    return {
        "FLOPs": kernels.flops,
        "kernels": sum(kernels.kernels.values()),
        "bytes moved": kernels.bytes_moved,
        "saved bytes": saved.total,
        "peak bytes": kernels.peak_bytes,
    }
