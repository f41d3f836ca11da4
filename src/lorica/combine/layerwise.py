"""What a combination of adapters has on one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorica.combine.logical import Unit, gain_of, has_gain, joined, matrix_of, plain_factors, units, weight_of
from lorica.combine.rules import RULES, Rule, clamped
from lorica.config import AdapterSpec
from lorica.errors import AdapterError
from lorica.init import Factors, target_generator
from lorica.layers import LoraLayer
from lorica.lowrank import Pair, Svd, cut, exact_svd, padded, stacked, svd_of_product, wide
from lorica.variants import VARIANTS


@dataclass(frozen=True)
class Recipe:
    """What is combined, and how.

    Attributes:
        adapters: names.
        weights: one of each.
        kind: a combination type.
        rank: of the result.
        rule: for the types that work on tensors entry by entry.
        clamp: quantile to which the factors of a decomposition are cut.
        driver: of the decomposition, on CUDA.
        seed: of random masks.
        bias: whether the result has a bias of B.
        kept: the variant that all adapters share and the result has too; empty: plain LoRA.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    kind: str
    rank: int
    rule: Rule | None = None
    clamp: float | None = None
    driver: str | None = None
    seed: int = 0
    bias: bool = False
    kept: str = ""


@dataclass(frozen=True)
class Share:
    """One adapter's part of what is combined on a unit.

    Attributes:
        unit: its factors.
        weight: the adapter's weight.
        scale: its scale.
        gain: what multiplies the sum of base weight and delta, ``[out]``.
        base: the unit's base weight ``[out, in]``, where there is a gain.
    """

    unit: Unit
    weight: float
    scale: float
    gain: Tensor | None = None
    base: Tensor | None = None

    def rows_of(self, index: int | None) -> Callable[[slice], Tensor]:
        """Return what gives rows of the delta ``[out, in]``, in float32 or wider.

        Args:
            index: which of a stack of deltas; None: there is one.
        """
        left, right = (widened(side if index is None else side[index]) for side in self.unit.pair)
        left = left * self.scale
        if self.gain is None or self.base is None:
            return lambda rows: left[rows] @ right
        gain, base = self.gain.unsqueeze(-1).to(left), self.base.to(left)
        return lambda rows: gain[rows] * torch.addmm(base[rows], left[rows], right) - base[rows]


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def combined(layer: LoraLayer, recipe: Recipe) -> Factors:
    """Return the logical factors that a combination has on a layer.

    Raises:
        AdapterError: the adapters cannot be combined so on this layer; names it and says why.
    """
    weighted = zip(recipe.adapters, recipe.weights, strict=True)
    taken = [_taken(layer, recipe, name, weight) for name, weight in weighted if name in layer.specs]
    found = []
    for of_unit in zip(*taken, strict=True):
        # As if fused projections stood alone: an adapter that is on others of them has no part here.
        shares = [share for share in of_unit if share.unit.adapted] or of_unit[:1]
        generator = target_generator(recipe.seed, shares[0].unit.name)
        unit = _combine(layer, shares, recipe, generator)
        if recipe.bias:
            unit = replace(unit, bias=_bias(shares, recipe, generator))
        found.append(unit)
    return joined(found)


def _taken(layer: LoraLayer, recipe: Recipe, adapter: str, weight: float) -> list[Share]:
    _check_spec(layer, adapter, layer.specs[adapter], recipe)
    return shares_of(layer, adapter, weight)


def shares_of(layer: LoraLayer, adapter: str, weight: float) -> list[Share]:
    """Return the units of an adapter on a layer, with the given weight.

    Raises:
        AdapterError: the base weight is needed and something is merged into it.
    """
    spec = layer.specs[adapter]
    taken = units(layer, plain_factors(layer, adapter), spec)
    if not has_gain(spec):
        return [Share(unit, weight, spec.scaling) for unit in taken]
    base = weight_of(layer)
    gain = gain_of(layer, adapter, base)
    return [Share(unit, weight, spec.scaling, gain[unit.outputs], matrix_of(layer, unit, base)) for unit in taken]


def _check_spec(layer: LoraLayer, adapter: str, spec: AdapterSpec, recipe: Recipe) -> None:
    reason = VARIANTS[spec.variant].unmergeable
    where = f"{layer.target_name}: adapter {adapter!r} with {spec.variant}"
    if reason and spec.variant != recipe.kept:
        raise AdapterError(f"{where} is combined only with adapters of the same {spec.variant}: {reason}")
    if has_gain(spec) and not recipe.kind.endswith("svd"):
        raise AdapterError(
            f"{where} changes the whole weight, which no sum of factors does; use combination_type 'svd' or one that "
            "ends with it, or convert_to_lora"
        )


def _combine(layer: LoraLayer, shares: Sequence[Share], recipe: Recipe, generator: torch.Generator) -> Unit:
    like = shares[0].unit
    if not any(share.unit.adapted for share in shares):
        return like.of(_zeros(like.pair, recipe.rank))
    if recipe.kind in RULES:
        return _by_factors(layer, shares, recipe, generator)
    if recipe.rank % like.groups:
        raise AdapterError(
            f"{layer.target_name}: a convolution of {like.groups} groups cannot have the rank {recipe.rank} of the "
            "combination; choose an svd_rank that they divide"
        )
    rank = recipe.rank // like.groups
    if recipe.kind not in ("cat", "svd") or any(share.gain is not None for share in shares):
        return like.of(_of_dense(shares, rank, recipe, generator))
    sum_of = stacked(
        [Pair(*map(wide, share.unit.pair)) for share in shares], [share.weight * share.scale for share in shares]
    )
    if recipe.kind == "cat":
        return like.of(padded(sum_of, rank))
    return like.of(_truncated(svd_of_product(*sum_of, driver=recipe.driver), rank, recipe))


def _zeros(pair: Pair, rank: int) -> Pair:
    left, right = pair
    return Pair(left.new_zeros(*left.shape[:-1], rank), right.new_zeros(*right.shape[:-2], rank, right.shape[-1]))


def _truncated(found: Svd, rank: int, recipe: Recipe) -> Pair:
    u, s, v = cut(found, rank)
    left, right = u * s.unsqueeze(-2), v
    if recipe.clamp is not None and left.dim() == 2:
        left, right = clamped(left, right, recipe.clamp)
    elif recipe.clamp is not None:
        pairs = [clamped(one, other, recipe.clamp) for one, other in zip(left, right, strict=True)]
        left, right = (torch.stack(sides) for sides in zip(*pairs, strict=True))
    return padded(Pair(left, right), rank)


def _of_dense(shares: Sequence[Share], rank: int, recipe: Recipe, generator: torch.Generator) -> Pair:
    """Return the decomposition of what pruning leaves: dense by its nature, so one matrix at a time."""
    rule = recipe.rule or Rule("", False)
    pair, weights = shares[0].unit.pair, [share.weight for share in shares]
    stack = pair.left.dim() > 2
    found = []
    for index in range(len(pair.left)) if stack else [None]:
        like = widened(pair.left).new_empty(pair.left.shape[-2], pair.right.shape[-1])
        matrix = rule.combine_rows([share.rows_of(index) for share in shares], weights, like, generator)
        found.append(_truncated(exact_svd(matrix, driver=recipe.driver), rank, recipe))
    if not stack:
        return found[0]
    return Pair(torch.stack([one.left for one in found]), torch.stack([one.right for one in found]))


def _by_factors(layer: LoraLayer, shares: Sequence[Share], recipe: Recipe, generator: torch.Generator) -> Unit:
    """Return the factors that a rule makes of all A's, and of all B's: cheap, and with products of one adapter's A and
    another's B in them."""
    ranks = {share.unit.pair.right.shape[-2] for share in shares}
    if len(ranks) > 1:
        raise AdapterError(
            f"{layer.target_name}: the adapters have the ranks {sorted(ranks)} here (rank_pattern), which "
            f"combination_type {recipe.kind!r} cannot add up; 'svd' and 'cat' can"
        )
    assert recipe.rule is not None
    scales = [share.weight * share.scale for share in shares]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    made = []
    for each in zip(*(share.unit.each_expert() for share in shares), strict=True):
        a = recipe.rule.combine([widened(unit.a) for unit in each], signed, generator)
        b = recipe.rule.combine([widened(unit.b) for unit in each], roots, generator)
        made.append(replace(each[0], a=a, b=b))
    unit: Unit = made[0]
    if shares[0].unit.stack:
        a, b = (torch.stack([getattr(one, side) for one in made]) for side in "ab")
        unit = replace(shares[0].unit, a=a, b=b)
    return unit.of(padded(unit.pair, recipe.rank // unit.groups))


def _bias(shares: Sequence[Share], recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return the bias of B: it is added to outputs as a delta's part is, so it is combined as a delta."""
    like = shares[0].unit.b
    zero = like.new_zeros(like.shape[0])
    biases = [widened(zero if share.unit.bias is None else share.unit.bias) * share.scale for share in shares]
    return (recipe.rule or Rule("", False)).combine(biases, [share.weight for share in shares], generator)


__all__ = ["Recipe", "Share", "combined", "shares_of", "widened"]
