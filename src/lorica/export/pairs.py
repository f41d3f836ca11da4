"""Plain pairs A, B under a checkpoint's names, with one rank and one scale for all: what servers take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.export.names import CheckpointNames, stacks_of
from lorica.export.saved import Saved, Weight
from lorica.init import Factors
from lorica.ops import op_of_parameter

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """The factors of one module in a checkpoint: A ``[r, in]``, B ``[out, r]``; of an embedding ``[r, V]``, ``[d, r]``.

    Attributes:
        name: full name of the module.
        scale: what multiplies ``B·A``.
        lookup: whether A is looked up by index.
        module: its name in transformers' model.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: float
    lookup: bool = False
    module: str = ""

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The name without its last part."""
        return self.name.rpartition(".")[0]


def single(saved: Saved) -> list[Pair]:
    """Return the pairs of all linear layers and embeddings."""
    names = CheckpointNames(saved.base)
    return [pair for weight in saved.weights if not weight.experts for pair in _matrix(weight, names)]


def _matrix(weight: Weight, names: CheckpointNames) -> list[Pair]:
    a, b, scale = weight.factors.a, weight.factors.b, weight.spec.scaling
    if weight.op.lookup:
        found = names.matrix(weight)
        name = found[0].name if len(found) == 1 else weight.module
        return [Pair(name, a, b, scale, lookup=True, module=weight.module)]
    return [Pair(rows.name, a, b[rows.rows], scale, module=weight.module) for rows in names.matrix(weight)]


def per_expert(saved: Saved, *, fill: bool) -> list[Pair]:
    """Return a pair for each expert and projection.

    Args:
        saved: the adapter.
        fill: zeros for the projections of the same experts that are not adapted.
    """
    names, found = CheckpointNames(saved.base), []
    for module, weights in _by_module(saved).items():
        owner = next(iter(weights.values())).owner
        rank = max(weight.spec.r for weight in weights.values())
        for parameter in stacks_of(owner) if fill else weights:
            weight = weights.get(parameter) or _nothing(module, owner, parameter, rank, weights)
            a, b = stacked(weight)
            found += [
                Pair(rows.name, a[rows.expert], b[rows.expert][rows.rows], weight.spec.scaling, module=module)
                for rows in names.experts(module, owner, parameter)
            ]
    return found


def fused(saved: Saved) -> list[tuple[str, Pair]]:
    """Return the name of the experts' module and a pair of stacks ``[E, r, in]``, ``[E, out, r]`` for each stack.

    The last part of a pair's name is the parameter's own. Stacks that are not adapted are there too, as zeros.
    """
    names, found = CheckpointNames(saved.base), []
    for module, weights in _by_module(saved).items():
        owner = next(iter(weights.values())).owner
        rank = max(weight.spec.r for weight in weights.values())
        for parameter in stacks_of(owner):
            weight = weights.get(parameter) or _nothing(module, owner, parameter, rank, weights)
            a, b = stacked(weight)
            place = names.stack(module, parameter)
            found.append((place, Pair(f"{place}.{parameter}", a, b, weight.spec.scaling)))
    return found


def _by_module(saved: Saved) -> dict[str, dict[str, Weight]]:
    found: dict[str, dict[str, Weight]] = {}
    for weight in saved.weights:
        if weight.experts:
            found.setdefault(weight.module, {})[weight.op.weight_name] = weight
    return found


def stacked(weight: Weight) -> tuple[Tensor, Tensor]:
    """Return ``[E, r, in]`` and ``[E, out, r]``, with a copy for each expert of what they share."""
    a, b = weight.factors.a, weight.factors.b
    if a.dim() == 2:
        a, b = (factor.expand(weight.experts, *factor.shape) for factor in (a, b))
    return a, b


def _nothing(module: str, owner: Any, parameter: str, rank: int, like: dict[str, Weight]) -> Weight:
    first = next(iter(like.values()))
    op = op_of_parameter(owner, parameter)
    assert op is not None
    a, b = (torch.zeros(shape, dtype=first.factors.a.dtype) for shape in op.factor_shapes(owner, rank))
    return replace(first, op=op, spec=replace(first.spec, r=rank), factors=Factors(a, b))


def common_rank(pairs: Iterable[Pair]) -> int:
    """Return the largest rank."""
    return max(pair.a.shape[-2] for pair in pairs)


def common_scale(pairs: Iterable[Pair]) -> float | None:
    """Return the scale that all have, or None."""
    scales = {pair.scale for pair in pairs if pair.b.any()}
    return scales.pop() if len(scales) == 1 else None


def padded(pair: Pair, rank: int) -> Pair:
    """Return a pair of a larger rank with the same product."""
    more = rank - pair.a.shape[-2]
    return pair if not more else replace(pair, a=F.pad(pair.a, (0, 0, 0, more)), b=F.pad(pair.b, (0, more)))


def scaled(pair: Pair, factor: float) -> Pair:
    """Return a pair whose B is multiplied by ``factor``, in one rounding."""
    if factor == 1:
        return pair
    b = pair.b.double().mul(factor) if math.frexp(factor)[0] != 0.5 else pair.b * factor  # a power of two is exact
    return replace(pair, b=b.to(pair.b.dtype), scale=pair.scale / factor)
