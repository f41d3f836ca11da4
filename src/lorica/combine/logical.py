"""One target's adapter as matrices: gathered from the ranks that hold it, taken apart, and put together again.

What is combined is the *logical* adapter, so that the result does not depend on how the model lies. Every rank computes
it from the same numbers and keeps its slices; one target at a time is whole on a rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapt.inject import logical_shapes, logical_weight
from lorica.config import AdapterSpec
from lorica.engines.gather import gather
from lorica.engines.registry import uncut
from lorica.engines.site import Site
from lorica.errors import AdapterError
from lorica.init import Factors
from lorica.layers import LoraLayer
from lorica.layout import Roles
from lorica.lowrank import Pair
from lorica.ops import Op
from lorica.variants import VARIANTS, Variant


@dataclass(frozen=True)
class Unit:
    """What is combined by itself: a layer's whole delta, one projection of those fused in it, one expert's.

    Attributes:
        name: full name, as if the projection stood alone.
        a: its rows of A, in A's own shape.
        b: its rows of B.
        bias: its part of B's bias, if there is one.
        adapted: whether the adapter is on it; otherwise its factors are zero and stay so.
        stack: whether the first dimension counts experts.
        groups: of a convolution.
        rows: first and last of the layer's outputs that are its; None: all.
    """

    name: str
    a: Tensor
    b: Tensor
    bias: Tensor | None
    adapted: bool = True
    stack: bool = False
    groups: int = 1
    rows: tuple[int, int] | None = None

    @property
    def outputs(self) -> slice:
        """Which of the layer's outputs are its."""
        return slice(None) if self.rows is None else slice(*self.rows)

    @property
    def pair(self) -> Pair:
        """``B, A`` as matrices ``[…, out, r]`` and ``[…, r, in]``: kernels flattened, a matrix for each group."""
        if self.stack:
            return Pair(self.b, self.a)
        left, right = self.b.flatten(1), self.a.flatten(1)
        if self.groups == 1:
            return Pair(left, right)
        return Pair(*(side.reshape(self.groups, -1, side.shape[1]) for side in (left, right)))

    def of(self, pair: Pair) -> Unit:
        """Return the unit with another delta, whose rank may differ (times the groups)."""
        left, right = pair
        if self.groups > 1:
            left, right = left.flatten(0, 1), right.flatten(0, 1)
        if self.stack:
            return replace(self, a=right, b=left)
        a = right.reshape(right.shape[0], *self.a.shape[1:])
        return replace(self, a=a, b=left.reshape(*left.shape, *[1] * (self.b.dim() - 2)))

    def each_expert(self) -> Iterator[Unit]:
        """Yield the units of a stack one by one, or this one."""
        if not self.stack:
            yield self
            return
        for a, b in zip(self.a.unbind(0), self.b.unbind(0), strict=True):
            yield replace(self, a=a, b=b, stack=False)


def plain_factors(layer: LoraLayer, adapter: str) -> Factors:
    """Return the logical factors of plain LoRA that an adapter amounts to on a layer (but for what multiplies all)."""
    roles = (layer.op.roles_a, layer.op.roles_b, layer.op.roles_bias)
    factors = layer.plain_factors(adapter)._replace(extras={})
    return _gathered(factors, roles, layer.site)


def raw_factors(layer: LoraLayer, adapter: str) -> Factors:
    """Return an adapter's logical tensors on a layer as they are, extras too."""
    return _gathered(layer.whole_factors(adapter), layer.factor_roles(adapter), layer.site)


def _gathered(factors: Factors, roles: Sequence[Roles], site: Site | None) -> Factors:
    if site is None:
        return factors
    sizes = site.layout.sizes
    whole = []
    for tensor, role in zip(factors.tensors(), roles, strict=False):  # of the roles, bias may have no tensor
        shape = [sizes.get(name, length) for name, length in zip(role, tensor.shape, strict=True)]
        whole.append(gather(tensor.contiguous(), site.layout, role, shape, site.axes))
    return factors.renewed(whole)


def units(layer: LoraLayer, factors: Factors, spec: AdapterSpec) -> list[Unit]:
    """Take logical plain factors of a layer apart."""
    op, base = layer.op, layer.base_layer
    parts = op.parts(base)
    if not parts:
        groups = getattr(base, "groups", 1) if "kernel" in op.roles_weight else 1
        stack = op.roles_a[0] == "expert"
        return [Unit(layer.target_name, factors.a, factors.b, factors.bias, stack=stack, groups=groups)]
    parent = layer.target_name.rpartition(".")[0]
    rank = factors.b.shape[1]
    found = []
    for index, (name, first, last) in enumerate(parts):
        bias = None if factors.bias is None else factors.bias[first:last]
        a = factors.a[index * rank : (index + 1) * rank]
        full = f"{parent}.{name}" if parent else name
        adapted = not spec.parts or name in spec.parts
        found.append(Unit(full, a, factors.b[first:last], bias, adapted, rows=(first, last)))
    return found


def joined(found: Sequence[Unit]) -> Factors:
    """Undo :func:`units`: return the layer's logical factors."""
    if len(found) == 1:
        return Factors(found[0].a, found[0].b, found[0].bias)
    biases = [unit.bias for unit in found if unit.bias is not None]
    return Factors(
        torch.cat([unit.a for unit in found]),
        torch.cat([unit.b for unit in found]),
        torch.cat(biases) if biases else None,
    )


def sliced(layer: LoraLayer, factors: Factors, roles: Sequence[Roles]) -> Factors:
    """Return what this rank holds of logical factors."""
    site = layer.site
    if site is None:
        return factors
    tensors = (site.layout.take(t, r, site.at) for t, r in zip(factors.tensors(), roles, strict=False))
    return factors.renewed(tensors)


def check_shapes(layer: LoraLayer, factors: Factors, spec: AdapterSpec) -> None:
    """Refuse logical factors that are none of a layer's: a mistake of the code that made them."""
    wanted = logical_shapes(layer.op, layer.base_layer, spec, layer.site)
    assert (factors.a.shape, factors.b.shape) == (wanted.a, wanted.b), layer.target_name


# ---- the base weight -------------------------------------------------------------------------------------------------


def weight_of(layer: LoraLayer) -> Tensor:
    """Return the logical base weight in its own precision (of a quantised one: float32), oriented as its op has it:
    ``[…, out, in, *k]``, and ``[words, width]`` of an embedding.

    Raises:
        AdapterError: adapters are merged into it.
    """
    if layer.merged:
        raise AdapterError(
            f"{layer.target_name}: this needs the base weight, and {layer.merged_adapters} are merged into it; unmerge "
            "first"
        )
    return logical_weight(layer.op, layer.base_layer, layer.site).detach()


def matrix_of(layer: LoraLayer, unit: Unit, weight: Tensor) -> Tensor:
    """Return a unit's part of what :func:`weight_of` gave as a matrix ``[…, out, in]``, in float32 or wider.

    Raises:
        TargetError: a delta of this layer has no place in its weight (a grouped convolution).
    """
    matrix = weight.T if layer.op.lookup else weight[unit.outputs]
    if unit.groups > 1:
        layer.op.delta(layer.base_layer, Factors(unit.a, unit.b))
    matrix = matrix if layer.op.roles_weight[0] == "expert" else matrix.flatten(1)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def has_gain(spec: AdapterSpec) -> bool:
    """Whether a variant multiplies the whole weight, so that its change is of full rank (DoRA)."""
    return type(VARIANTS[spec.variant]).gain is not Variant.gain


def gain_of(layer: LoraLayer, adapter: str, weight: Tensor) -> Tensor:
    """Return what multiplies every logical output, ``[out]``.

    Args:
        layer: an adapted layer.
        adapter: of a variant that :func:`has_gain`.
        weight: what :func:`weight_of` gave.
    """
    spec = layer.specs[adapter]
    whole: Any = _Whole(layer, spec, weight)
    gain = VARIANTS[spec.variant].gain(whole, raw_factors(layer, adapter), spec)
    assert gain is not None
    return gain


class _Whole:
    """An adapted layer as a variant would see it on one process that has all of it."""

    site = None
    training = False

    def __init__(self, layer: LoraLayer, spec: AdapterSpec, weight: Tensor) -> None:
        self.op: Op = layer.op
        self.target_name = layer.target_name
        self.specs = {"": spec}
        self.notes: dict[Any, Any] = {}
        self.base_weight = self.op.orient(weight)  # its own inverse
        self.base_layer: nn.Module = _holding(layer.base_layer, self.op.weight_name, self.base_weight)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def unmerged_weight(self) -> Tensor:
        return self.base_weight

    def share_at_rest(self) -> tuple[slice, slice]:
        return slice(None), slice(None)


def _holding(base: Any, name: str, weight: Tensor) -> Any:
    """Return a copy of a base layer that shares everything but its weight, which is whole."""
    copied = copy.copy(base)
    copied._parameters = {**base._parameters, name: nn.Parameter(weight, requires_grad=False)}
    uncut(copied)
    return copied


__all__ = [
    "Unit",
    "check_shapes",
    "gain_of",
    "has_gain",
    "joined",
    "matrix_of",
    "plain_factors",
    "raw_factors",
    "sliced",
    "units",
    "weight_of",
]
