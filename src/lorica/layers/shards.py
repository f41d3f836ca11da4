"""Merging what one rank has of a weight, without a model around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lorica.engines.gather import gather
from lorica.engines.site import Axis
from lorica.errors import LayoutError
from lorica.init import Factors
from lorica.layout import Layout, Roles
from lorica.layout.layout import At
from lorica.ops.fused import spread_by
from lorica.storage import Term, add_low_rank_, storage_of

#: How a factor is given: as the slice that the weight's layout names, whole, or cut by a layout (and roles) of its own.
Given = Literal["local", "logical"] | tuple[Layout, Roles]


@torch.no_grad()
def merge_shard_(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    layout: Layout,
    at: At,
    *,
    scaling: float,
    roles: Roles = ("out", "in"),
    a_given: Given = "local",
    b_given: Given = "local",
    axes: Mapping[str, Axis] | None = None,
) -> Tensor:
    """Add ``s·B·A`` to what one rank has of a weight, in place: in float32, in chunks of rows, rounded once.

    Nothing is sent, unless a factor has a layout of its own: Megatron's column layers have A as ``[r/N, in]``, for
    one. Then the ranks of that layout's axes gather it, and each keeps what it needs.

    Args:
        weight: this rank's part of the weight.
        a: ``[r, in]``; ``[E, r, in]`` for experts with a pair each; ``[P·r, in]`` for ``P`` fused projections.
        b: ``[out, r]`` or ``[E, out, r]``.
        layout: how the weight lies over ranks: cut by columns, rows, words, experts or heads, with copies or without.
        at: this rank's coordinates.
        scaling: ``s``.
        roles: of the weight's dimensions; ``("in", "out")`` of an embedding (its words are ``"in"``) and of a
            transposed weight, with ``"expert"`` before them where experts are stacked.
        a_given: how ``a`` is given.
        b_given: how ``b`` is given.
        axes: the axes of the factors' own layouts, as this rank sees them.

    Returns:
        ``weight``.

    Raises:
        LayoutError: a shape is not what the layout says.
        AdapterError: no delta can be added to a weight stored so.
    """
    expert = ("expert",) if a.dim() == 3 else ()
    _check(weight, roles, layout, at, "the weight", given="local")
    a = _slice(a, (*expert, "rank", "in"), layout, at, a_given, axes, "A")
    b = _slice(b, (*expert, "out", "rank"), layout, at, b_given, axes, "B")
    if a.shape[-2] != b.shape[-1]:
        if a.shape[-2] != len(layout.parts) * b.shape[-1]:
            raise LayoutError(f"A {tuple(a.shape)} and B {tuple(b.shape)} of {len(layout.parts) or 1} parts do not fit")
        a, b, *_ = spread_by(Factors(a, b), layout, at)
    left, right = (b, a) if roles.index("out") < roles.index("in") else (a.mT, b.mT)
    add_low_rank_(weight, [Term(left, right, scaling)], storage_of(weight, "a shard"))
    return weight


def _slice(
    factor: Tensor, roles: Roles, layout: Layout, at: At, given: Given, axes: Mapping[str, Axis] | None, what: str
) -> Tensor:
    """Return this rank's slice of a factor."""
    if isinstance(given, tuple):
        own, own_roles = given
        sizes: Mapping[str, int] = own.sizes
        shape = [sizes.get(role, length) for role, length in zip(own_roles, factor.shape, strict=True)]
        factor, given = gather(factor, own, own_roles, shape, axes or {}), "logical"
    _check(factor, roles, layout, at, what, given)
    return layout.take(factor, roles, at) if given == "logical" else factor


def _check(tensor: Tensor, roles: Roles, layout: Layout, at: At, what: str, given: str) -> None:
    """Refuse a tensor that has not the shape that the layout gives it; the rank may be any number."""
    sizes: Mapping[str, int] = layout.sizes
    if tensor.dim() != len(roles):
        raise LayoutError(f"{what} has the shape {tuple(tensor.shape)}; one with the dimensions {roles} is needed")
    logical = [sizes.get(role, length) for role, length in zip(roles, tensor.shape, strict=True)]
    wanted: Sequence[int] = layout.local_shape(roles, logical, at) if given == "local" else logical
    if tuple(tensor.shape) != tuple(wanted):
        raise LayoutError(f"{what} has the shape {tuple(tensor.shape)}; at {dict(at)} it is {tuple(wanted)} ({given})")


__all__ = ["Given", "merge_shard_"]
