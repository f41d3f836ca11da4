"""Intruder dimensions: leading directions of an adapted weight that the base weight has nothing like.

Source: LoRA vs Full Fine-tuning: An Illusion of Equivalence, https://arxiv.org/abs/2410.21228
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapt.inject import adapter_modules, base_of, tuner_of
from lorica.checkpoint.names import config_of_adapter
from lorica.combine import place
from lorica.combine.layerwise import Share, shares_of
from lorica.combine.logical import Unit, joined, matrix_of, raw_factors, weight_of
from lorica.config import LoraConfig
from lorica.engines import fsdp
from lorica.errors import AdapterError
from lorica.init import Factors
from lorica.layers import LoraLayer
from lorica.lowrank import Pair, Svd, cut, exact_svd, padded, stacked, svd_of_product, wide


@dataclass(frozen=True)
class IntruderDimensions:
    """The leading directions of one adapted weight.

    Attributes:
        name: live name of the layer (of a fused projection: as if it stood alone; of an expert: with its number).
        values: the singular values of ``W + ΔW``, falling, ``[k]``.
        similarity: for each, the largest cosine (up to the sign) of its left singular vector with one of the base
            weight's, ``[k]``.
        intruders: which of them are below the threshold.
    """

    name: str
    values: Tensor
    similarity: Tensor
    intruders: tuple[int, ...]


@dataclass(frozen=True)
class _Found:
    report: IntruderDimensions
    merged: Svd


@torch.no_grad()
def intruder_dimensions(
    model: nn.Module, adapter_name: str = "default", top_k: int = 10, threshold_epsilon: float = 0.5
) -> list[IntruderDimensions]:
    """Return what an adapter does to the leading directions of each of its weights; nothing is changed.

    Weights are taken as ``[out, in]``, and their left singular vectors compared. On a model that lies over ranks all of
    them call, and all get the answer.

    Args:
        model: an adapted model.
        adapter_name: which adapter.
        top_k: how many directions of the adapted weight are looked at.
        threshold_epsilon: a direction whose similarity is below is an intruder.

    Raises:
        AdapterError: there is no such adapter, its change is no low-rank matrix, or something is merged.
        TargetError: a delta has no place in its weight (a grouped convolution).
    """
    fsdp.reshard(base_of(model))
    _checked(model, adapter_name)
    found = []
    for path, layer in _layers(model, adapter_name):
        found += [
            one.report for _, ones in _analysed(path, layer, adapter_name, top_k, threshold_epsilon) for one in ones
        ]
    return found


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> None:
    """Put a copy of an adapter in, with the intruder dimensions of every weight made smaller, and make it active.

    It recovers knowledge that fine-tuning covered, at some cost for what was learned. The new delta is
    ``ΔW + (λ - 1)·Σ σ·u·vᵀ`` over the intruders of ``W + ΔW``, cut to the adapter's rank: a product of stacked factors.

    Args:
        peft_model: an adapted model.
        old_adapter_name: which adapter.
        new_adapter_name: the new one's name.
        top_k: how many directions of the adapted weight are looked at.
        threshold_epsilon: a direction whose largest cosine with one of the base weight's is below is an intruder.
        mitigation_lambda: what is left of an intruder; 1: all.
        logging_sink: told each layer's number of intruders; None: nobody.

    Raises:
        AdapterError: there is no such adapter, its change is no low-rank matrix, something is merged, or the new name
            is taken. Nothing was changed.
        TargetError: a delta has no place in its weight (a grouped convolution).
    """
    say = logging_sink or (lambda message: None)
    tuner: Any = tuner_of(peft_model)
    if tuner is None:
        raise AdapterError("The provided model is not using LoRA and is therefore not supported.")
    with tuner.switch.turns.changing():
        if new_adapter_name in tuner.peft_config:
            raise AdapterError(f"Adapter with name {new_adapter_name} already exists. Please use a different name.")
        fsdp.reshard(tuner.model)
        config = _checked(peft_model, old_adapter_name)
        made: dict[str, Factors] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path, layer in _layers(peft_model, old_adapter_name):
            analysed = list(_analysed(path, layer, old_adapter_name, top_k, threshold_epsilon))
            reports = [one.report for _, ones in analysed for one in ones]
            for report in reports:
                say(
                    f"{report.name}: " + (f"Intruders: {len(report.intruders)}" if report.intruders else "No intruders")
                )
            dtypes[layer.target_name] = layer.factors(old_adapter_name).b.dtype
            if any(report.intruders for report in reports) or layer.specs[old_adapter_name].variant:
                made[layer.target_name] = joined(
                    [_reduced(layer, share, ones, mitigation_lambda) for share, ones in analysed]
                )
            else:
                made[layer.target_name] = raw_factors(layer, old_adapter_name)
        place.add_filled(tuner, new_adapter_name, place.plain(config), made, dtypes, [old_adapter_name])
        say(f"Enabling new adapter {new_adapter_name}")
        tuner.set_adapter(new_adapter_name)


def _checked(model: nn.Module, adapter: str) -> LoraConfig:
    config = config_of_adapter(base_of(model), adapter)
    place.refuse_tokens(adapter, config)
    place.refuse_start(adapter, config)
    return config


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in adapter_modules(model):
        if isinstance(module, LoraLayer) and adapter in module.specs and adapter not in module.tied:
            yield path, module


def _analysed(
    path: str, layer: LoraLayer, adapter: str, top_k: int, threshold: float
) -> Iterator[tuple[Share, list[_Found]]]:
    """Yield each unit of a layer and what was found of it, one for each expert."""
    base = weight_of(layer)
    for share in shares_of(layer, adapter, 1.0):
        if share.gain is not None:
            raise AdapterError(
                f"{layer.target_name}: adapter {adapter!r} with {layer.specs[adapter].variant} changes the whole "
                "weight; convert_to_lora makes it plain LoRA"
            )
        name = path if share.unit.rows is None else f"{path.rpartition('.')[0]}.{share.unit.name.rpartition('.')[2]}"
        matrix = matrix_of(layer, share.unit, base)
        if not share.unit.adapted:
            yield share, []
        elif matrix.dim() == 2:
            yield share, [_compared(name, matrix, share.rows_of(None)(slice(None)), top_k, threshold)]
        else:
            stack = share.unit.stack
            yield (
                share,
                [
                    _compared(f"{name}[{e}]", one, share.rows_of(e if stack else None)(slice(None)), top_k, threshold)
                    for e, one in enumerate(matrix)
                ],
            )


def _compared(name: str, base: Tensor, delta: Tensor, top_k: int, threshold: float) -> _Found:
    known = exact_svd(base).u
    merged = cut(exact_svd(base + delta), top_k)
    similarity = (merged.u.mT @ known).abs().amax(1)
    intruders = torch.where(similarity < threshold)[0].tolist()
    return _Found(IntruderDimensions(name, merged.s, similarity, tuple(intruders)), merged)


def _reduced(layer: LoraLayer, share: Share, found: list[_Found], left_over: float) -> Unit:
    unit, scale = share.unit, share.scale
    if not found:
        return unit
    if not unit.stack:
        return unit.of(_without(unit.pair, found[0], scale, left_over))
    if unit.pair.left.dim() == 2:
        raise AdapterError(
            f"{layer.target_name}: one pair of factors for all experts cannot lose other directions for each; their "
            "intruders can be reported (intruder_dimensions)"
        )
    experts = zip(unit.pair.left, unit.pair.right, found, strict=True)
    made = [_without(Pair(left, right), one, scale, left_over) for left, right, one in experts]
    return replace(unit.of(Pair(*(torch.stack(sides) for sides in zip(*made, strict=True)))))


def _without(pair: Pair, found: _Found, scale: float, left_over: float) -> Pair:
    """Return a pair of the same rank; both sides get the root of each singular value, as they train well so."""
    chosen, rank = list(found.report.intruders), pair.left.shape[1]
    u, s, v = found.merged
    spoiled = Pair(wide(u[:, chosen] * s[chosen]), wide(v[chosen]))
    whole = stacked([Pair(*map(wide, pair)), spoiled], [1.0, (left_over - 1) / scale])
    u, s, v = cut(svd_of_product(*whole), rank)
    return padded(Pair(u * s.sqrt(), s.sqrt().unsqueeze(1) * v), rank)


__all__ = ["IntruderDimensions", "intruder_dimensions", "reduce_intruder_dimension"]
