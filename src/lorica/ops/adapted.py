"""A weight with low-rank deltas that is multiplied and never added up: ``x (W + s·L·R) = x W + s·(x L) R``.

A module that multiplies by a bare parameter in its own way (transformers' experts: token by token, grouped, batched,
with biases, gates and norms in between) is adapted by handing it such a weight for the length of one forward. Its own
code runs unchanged, on the routed tokens only; what it multiplies is the product of the sum, and every other question
it may ask of the weight (shape, dtype, one expert of it, its transpose) has the same answer as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.kernels import Projection, grouped, kernel_for
from lorica.ops.base import Host, autocast_off
from lorica.ops.dropout import drop

#: What a weight is asked that a delta does not change.
_METADATA = {
    *("shape", "dtype", "device", "ndim", "layout", "names", "is_cuda", "is_cpu", "is_meta", "requires_grad"),
    *("size", "dim", "numel", "stride", "storage_offset", "data_ptr", "get_device", "itemsize", "element_size"),
    *("nbytes", "is_contiguous", "is_floating_point"),
}


class Delta(NamedTuple):
    """One low-rank delta ``s·left·right``.

    Attributes:
        left: ``[rows, r]``, or one for each expert ``[E, rows, r]``.
        right: ``[r, cols]`` or ``[E, r, cols]``.
        spec: scale and dropout.
        host: the adapted layer.
        generator: of the masks of its dropout, on a layer that lies over ranks.
    """

    left: Tensor
    right: Tensor
    spec: AdapterSpec
    host: Host
    generator: torch.Generator | None = None

    def turned(self) -> Delta:
        """Return the delta of the transposed weight."""
        return self._replace(left=self.right.mT, right=self.left.mT)

    def chosen(self, experts: Tensor) -> Delta:
        """Return the delta of a vector of experts."""
        if self.left.dim() == 2:
            return self
        return self._replace(left=self.left.index_select(0, experts), right=self.right.index_select(0, experts))


class AdaptedWeight:
    """Stands for ``weight + Σ s·left·right`` wherever it is a factor of a product.

    Args:
        weight: ``[rows, cols]``, or one for each expert ``[E, rows, cols]``.
        deltas: their factors have the weight's leading size, or none where all experts share them.

    Attributes:
        asked: whether anybody took a part or a view of it, or multiplied by it.
    """

    def __init__(self, weight: Tensor, deltas: Sequence[Delta]) -> None:
        self.weight = weight
        self.deltas = tuple(deltas)
        self.asked = False

    # ---- parts and views ------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        """Return one expert's weight, or those of a vector of experts."""
        self.asked = True
        if self.weight.dim() == 3 and _is_integer(index):
            return self._expert(int(index))
        if self.weight.dim() == 3 and isinstance(index, Tensor) and index.dim() == 1:
            return AdaptedWeight(self.weight[index], [delta.chosen(index) for delta in self.deltas])
        return self.added_up("indexing")[index]

    def _expert(self, index: int) -> AdaptedWeight:
        if torch.is_grad_enabled():
            pairs = [(left[index], right[index]) for left, right in self._apart]
        else:
            pairs = [(d.left, d.right) if d.left.dim() == 2 else (d.left[index], d.right[index]) for d in self.deltas]
        parts = [d._replace(left=left, right=right) for d, (left, right) in zip(self.deltas, pairs, strict=True)]
        return AdaptedWeight(self.weight[index], parts)

    @cached_property
    def _apart(self) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        # Taken apart once: indexing a factor expert by expert would make a whole stack of zeros for each in backward.
        # And cast once: a cast for each expert would be a kernel for each.
        count, device, dtype = len(self.weight), self.weight.device.type, self.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        stacks = [(delta.left.to(dtype), delta.right.to(dtype)) for delta in self.deltas]
        return [
            ([left] * count, [right] * count) if left.dim() == 2 else (left.unbind(0), right.unbind(0))
            for left, right in stacks
        ]

    def transpose(self, first: int, second: int) -> Any:
        """Return the transposed weight."""
        dims = self.weight.dim()
        if {first % dims, second % dims} == {dims - 2, dims - 1}:
            return self.mT
        return self.added_up("transpose").transpose(first, second)

    @property
    def mT(self) -> AdaptedWeight:
        """The weight with its last two dimensions exchanged."""
        self.asked = True
        return AdaptedWeight(self.weight.mT, [delta.turned() for delta in self.deltas])

    @property
    def T(self) -> Any:
        """The transposed weight of two dimensions."""
        return self.mT if self.weight.dim() == 2 else self.added_up("T").T

    def t(self) -> Any:
        """Return the transposed weight of two dimensions."""
        return self.T

    def to(self, *args: Any, **kwargs: Any) -> AdaptedWeight:
        """Return the weight in another dtype or on another device; products take the factors to their output's."""
        self.asked = True
        return AdaptedWeight(self.weight.to(*args, **kwargs), self.deltas)

    def float(self) -> AdaptedWeight:
        """Return the weight in float32."""
        return self.to(torch.float32)

    def contiguous(self) -> AdaptedWeight:
        """Return the weight with its elements in order."""
        self.asked = True
        return AdaptedWeight(self.weight.contiguous(), self.deltas)

    def added_up(self, operation: str) -> Tensor:
        """Return ``weight + Σ s·left·right``, for an operation that is no product; a warning says so."""
        warnings.warn(
            f"{self.deltas[0].host.target_name}: {operation} is not known for an adapted parameter, so its delta is "
            "formed, which takes as much memory as the weight",
            stacklevel=3,
        )
        self.asked = True
        total = self.weight
        for left, right, spec, *_ in self.deltas:
            total = total + spec.scaling * (left.to(total.dtype) @ right.to(total.dtype))
        return total

    def __getattr__(self, name: str) -> Any:
        """Answer as the base weight where the delta does not matter, as the sum where it does."""
        if name in _METADATA:
            return getattr(self.weight, name)
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.added_up(name), name)

    def __len__(self) -> int:
        return len(self.weight)

    # ---- products -------------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Multiply; see :data:`_PRODUCTS`."""
        kwargs = kwargs or {}
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, cls):
                arg.asked = True
        name = getattr(func, "__name__", str(func))
        product = _PRODUCTS.get(name)
        result = NotImplemented if product is None else product(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
        args = tuple(arg.added_up(name) if isinstance(arg, cls) else arg for arg in args)
        return func(*args, **{k: v.added_up(name) if isinstance(v, cls) else v for k, v in kwargs.items()})

    def __matmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (AdaptedWeight,), (self, other))


def _linear(func: Callable[..., Any], x: Any, weight: Any, bias: Any = None) -> Any:
    """``x Wᵀ + bias``."""
    if not (isinstance(x, Tensor) and isinstance(weight, AdaptedWeight)) or isinstance(bias, AdaptedWeight):
        return NotImplemented
    delta = _lean(x, weight)
    if delta is not None and (bias is None or not bias.requires_grad):
        return _projection(x, Projection(weight.weight, bias, delta.right, delta.left, delta.spec.scaling))
    return _plus_deltas(func(x, weight.weight, bias), x, weight.mT)


def _matmul(func: Callable[..., Any], first: Any, second: Any, **kwargs: Any) -> Any:
    """``x W`` or ``W x``, of matrices or of as many matrices on both sides."""
    if kwargs:
        return NotImplemented
    if isinstance(first, Tensor) and isinstance(second, AdaptedWeight):
        if second.weight.dim() == 3 and first.dim() != 3:
            return NotImplemented
        delta = _lean(first, second) if second.weight.dim() == 2 and first.dim() > 1 else None
        if delta is not None:
            item = Projection(second.weight.mT, None, delta.left.mT, delta.right.mT, delta.spec.scaling)
            return _projection(first, item)
        return _plus_deltas(func(first, second.weight), first, second)
    if isinstance(first, AdaptedWeight) and isinstance(second, Tensor) and first.weight.dim() == second.dim():
        return _plus_deltas(func(first.weight, second).mT, second.mT, first.mT).mT
    return NotImplemented


def _grouped(func: Callable[..., Any], x: Any, weight: Any, offs: Any = None, **kwargs: Any) -> Any:
    """``x_e W_e`` for each expert ``e`` whose rows end at ``offs[e]``."""
    if not isinstance(x, Tensor) or not isinstance(weight, AdaptedWeight) or offs is None:
        return NotImplemented
    if any(value is not None for value in kwargs.values()):
        return NotImplemented
    lean = _lean(x, weight)
    if lean is not None:
        arguments = (func, x, weight.weight, lean.left.mT, lean.right.mT, lean.spec.scaling, offs)
        return kernel_for("grouped", *arguments)(*arguments)
    y = func(x, weight.weight, offs=offs)
    with autocast_off(y.device.type):
        for delta in weight.deltas:
            part = grouped.part(func, _drop(x.to(y.dtype), delta, "pre"), delta.left.mT, delta.right.mT, offs)
            y = torch.add(y, _drop(part, delta, "post"), alpha=delta.spec.scaling)
    return y


def _lean(x: Tensor, weight: AdaptedWeight) -> Delta | None:
    """Return the delta of a weight where it is the only one and nothing lies between it and the base product."""
    if len(weight.deltas) != 1 or weight.weight.requires_grad or x.dtype != weight.weight.dtype:
        return None
    if torch.compiler.is_compiling():  # which does itself what a choice of implementations is for
        return None
    delta = weight.deltas[0]
    if (delta.spec.dropout and delta.host.training) or torch.is_autocast_enabled(x.device.type):
        return None
    return delta


def _projection(x: Tensor, item: Projection) -> Tensor:
    y: Tensor = kernel_for("projection", x, item)(x, item)
    return y


#: What torch, or transformers, calls a product → what to do when an adapted weight is a factor of it.
_PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _grouped),
}


def _plus_deltas(y: Tensor, x: Tensor, weight: AdaptedWeight) -> Tensor:
    """Return ``y + Σ s·(x·left)·right``; ``x`` is ``[…, rows]`` and ``y`` ``[…, cols]``."""
    with autocast_off(y.device.type):
        for delta in weight.deltas:
            y = _plus_delta(y, x, delta)
    return y


def _plus_delta(y: Tensor, x: Tensor, delta: Delta) -> Tensor:
    left, right = delta.left.to(y.dtype), delta.right.to(y.dtype)
    x = _drop(x.to(y.dtype), delta, "pre")
    if left.dim() == 3:
        return _plus(y, x @ left, right, delta)
    flat = _plus(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]) @ left, right, delta)
    return flat.view(y.shape)


def _plus(y: Tensor, h: Tensor, right: Tensor, delta: Delta) -> Tensor:
    """Return ``y + s·h·right`` in one product, unless the part is dropped from in between."""
    scale, spec = delta.spec.scaling, delta.spec
    if spec.dropout and delta.host.training and spec.dropout_position == "post":
        return torch.add(y, _drop(h @ right, delta, "post"), alpha=scale)
    if not torch.is_grad_enabled():  # into what the base product has just returned
        return (y.baddbmm_ if right.dim() == 3 else y.addmm_)(h, right, alpha=scale)
    return (torch.baddbmm if right.dim() == 3 else torch.addmm)(y, h, right, alpha=scale)


def _drop(x: Tensor, delta: Delta, position: str) -> Tensor:
    return drop(x, delta.spec, position, delta.host.site, delta.host.training, delta.generator)


def _is_integer(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dim() == 0 and not index.dtype.is_floating_point and index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


__all__ = ["AdaptedWeight", "Delta"]
