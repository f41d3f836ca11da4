"""Factors of a larger rank than they need: the rest of A and B is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorica.checkpoint.names import Entry
from lorica.config import AdapterSpec
from lorica.engines.kinds import is_distributed
from lorica.errors import AdapterError, LayoutError
from lorica.layers import LoraLayer
from lorica.layout import Roles
from lorica.variants import VARIANTS


class Padded:
    """A tensor of which more is asked than there is: the rest of each block along one dimension is zero.

    Args:
        source: the tensor, or what slices index as one.
        shape: its shape.
        wanted: the shape that is asked for.
        dim: where they differ.
        blocks: how many runs of equal length stand one behind the other there, each padded on its own.
    """

    def __init__(self, source: Any, shape: Sequence[int], wanted: Sequence[int], dim: int, blocks: int) -> None:
        self._source, self._dim = source, dim
        self._have, self._want = shape[dim] // blocks, wanted[dim] // blocks

    def __getitem__(self, key: tuple[slice, ...]) -> Tensor:
        asked = key[self._dim]
        found: list[Tensor] = []
        place = asked.start
        while place < asked.stop:
            block, offset = divmod(place, self._want)
            stop = min(asked.stop, (block + 1) * self._want) - block * self._want
            first, last = min(offset, self._have), min(stop, self._have)
            inside = slice(block * self._have + first, block * self._have + last)
            index = (*key[: self._dim], inside, *key[self._dim + 1 :])
            part: Tensor = self._source[index]
            missing = (stop - offset) - (last - first)
            shape = [*part.shape[: self._dim], missing, *part.shape[self._dim + 1 :]]
            found += [part, part.new_zeros(shape)]
            place = block * self._want + stop
        return torch.cat(found, self._dim)


def rank_dim(entry: Entry) -> int | None:
    """Return which dimension of a tensor in a file grows with the rank."""
    if "rank" not in entry.roles:
        return None
    if entry.roles[0] == "expert":  # in a file the experts' ranks lie in one dimension
        return 0 if entry.roles.index("rank") == 1 else 1
    return entry.roles.index("rank")


def blocks_of(entry: Entry, layer: LoraLayer) -> int:
    """Return in how many runs the ranks of a tensor in a file lie one behind the other."""
    if entry.roles[0] == "expert" and entry.roles.index("rank") == 1:
        return int(entry.whole_shape[0])
    return _groups(layer) if entry.roles[0] == "rank" else 1


def _groups(layer: LoraLayer) -> int:
    """Return in how many groups a convolution divides its channels, and so the rows of A."""
    return int(getattr(layer.get_base_layer(), "groups", 1))


def is_b(name: str) -> bool:
    """Whether a tensor of this name in a file carries the scale: B, or its bias."""
    return ".lora_B." in name or name.endswith(".lora_embedding_B")


def check_growth(layer: LoraLayer, adapter: str, rank: int) -> None:
    """Refuse a rank that an adapter's factors cannot be padded to.

    Raises:
        AdapterError: it is smaller, does not fit groups of channels, or the factors have another shape or are merged.
        LayoutError: the factors are sharded.
    """
    spec, op, groups = layer.specs[adapter], layer.op, _groups(layer)
    if spec.r > rank:
        raise AdapterError(
            f"{layer.target_name}: Trying to pad the adapter to the target rank {rank}, but the original rank is "
            f"larger ({spec.r}). This is not possible."
        )
    if rank % groups:
        raise AdapterError(
            f"{layer.target_name}: Trying to pad a convolution with groups={groups} to target rank {rank}, but the "
            f"target rank is not divisible by {groups}. Please choose a target rank that is divisible by groups."
        )
    shapes = op.factor_shapes(layer.base_layer, spec.r)
    if spec.r < rank and VARIANTS[spec.variant].shapes(shapes, op, spec) != shapes:
        raise AdapterError(f"{layer.target_name}: factors of {spec.variant} cannot be padded to another rank")
    if spec.r < rank and any(is_distributed(tensor) for tensor in layer.factors(adapter).tensors()):
        raise LayoutError(f"{layer.target_name}: ranks grow before fully_shard is applied, not after it")
    if layer.merged and spec.r < rank:
        raise AdapterError(f"{layer.target_name}: {layer.merged_adapters} are merged; unmerge them first")


@torch.no_grad()
def grow(layer: LoraLayer, adapter: str, rank: int) -> None:
    """Pad an adapter's factors to a rank; what they compute stays."""
    spec = layer.specs[adapter]
    if spec.r == rank:
        return
    grown = replace(spec, r=rank, scaling=AdapterSpec.scale(rank, spec.alpha, rslora=spec.rslora))
    by_user = 1.0 if spec.natural_scaling == 0 else spec.scaling / spec.natural_scaling
    layer.specs[adapter] = replace(grown, scaling=grown.scaling * by_user)
    if adapter in layer.tied:
        return
    ratio = 1.0 if grown.scaling == 0 else spec.natural_scaling / grown.scaling
    names, roles = layer.factor_names(adapter), layer.factor_roles(adapter)
    parts = len(layer.op.parts(layer.base_layer)) or _groups(layer)
    for name, role, tensor in zip(names, roles, layer.factors(adapter).tensors(), strict=True):
        value = tensor * ratio if is_b(f".{name}") else tensor
        tensor.data = _widened(value, role, spec.r, rank, parts if role[0] == "rank" else 1)
        tensor.grad = None
    layer.notes.clear()


def _widened(tensor: Tensor, roles: Roles, have: int, want: int, blocks: int) -> Tensor:
    if "rank" not in roles:
        return tensor.detach().clone()
    dim = roles.index("rank")
    runs = tensor.detach().unflatten(dim, (blocks, -1))  # type: ignore[no-untyped-call]
    shape = list(runs.shape)
    shape[dim + 1] = shape[dim + 1] * want // have
    result: Tensor = runs.new_zeros(shape)
    result.narrow(dim + 1, 0, runs.shape[dim + 1]).copy_(runs)
    return result.flatten(dim, dim + 1)


__all__ = ["Padded", "blocks_of", "check_growth", "grow", "is_b", "rank_dim"]
