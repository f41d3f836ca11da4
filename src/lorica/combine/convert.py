"""Any adapter as plain LoRA: of a variant, of another rank, or of as many directions as explain a share of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lorica.adapt.inject import base_of, switch_of
from lorica.checkpoint.names import WEIGHTS_NAME, config_of_adapter
from lorica.checkpoint.saving import get_peft_model_state_dict
from lorica.combine import place
from lorica.combine.layerwise import Share, shares_of, widened
from lorica.combine.logical import Unit, joined
from lorica.config import LoraConfig
from lorica.engines import Engines, fsdp
from lorica.errors import AdapterError
from lorica.files.atomic import at_once, write_tensors
from lorica.init import Factors
from lorica.layers import LoraLayer, Switch
from lorica.lowrank import Pair, Svd, cut, exact_svd, padded, rank_of_energy, svd_of_product, wide
from lorica.variants import VARIANTS


@dataclass(frozen=True)
class Conversion:
    """What became of one target.

    Attributes:
        name: full name.
        rank: of its new factors.
        error: relative error of the delta (Frobenius norm).
    """

    name: str
    rank: int
    error: float


Report = Callable[[Conversion], object]


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    report: Report | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return configuration and tensors of the plain LoRA that is nearest to what an adapter does to its weights.

    For DoRA that is the change of the whole weight, which is dense: one target at a time. For the variants that have
    factors, and for LoRA of another rank, no such matrix is formed. Scales are within the factors, α is the rank.

    Args:
        model: an adapted model, with or without its wrappers. It is as before afterwards.
        rank: a whole number, or the share of the squared singular values of every delta that its factors are to
            explain, above 0 and up to 1; the ranks of the layers differ then, and are in ``rank_pattern``.
        adapter_name: which adapter.
        progressbar: show one.
        compile_kwargs: accepted; there is nothing to compile.
        report: told the rank and the error of every target.

    Returns:
        The configuration and the tensors by their names in a file. On a model that lies over ranks all of them call,
        and the first gets the tensors.

    Raises:
        TypeError: no layer has the adapter, or one has a variant that is no change of a weight.
        ValueError: the rank is impossible, larger than a side of a weight, or the adapter trains biases.
    """
    _check_rank(rank)
    with (switch_of(model) or Switch()).turns.changing():
        layers = place.layers_of(model, [adapter_name])
        config = _checked_config(model, layers, adapter_name)
        fsdp.reshard(base_of(model))
        made: dict[str, Factors] = {}
        dtypes: dict[str, torch.dtype] = {}
        ranks: dict[str, int] = {}
        with torch.no_grad():
            for layer in tqdm(layers, disable=not progressbar, desc="Converting to LoRA"):
                names = place.target_names(layer, [adapter_name])
                if place.free(layer, [adapter_name]):
                    found, used = _converted(layer, adapter_name, rank, report)
                    made[layer.target_name], dtypes[layer.target_name] = found, layer.factors(adapter_name).b.dtype
                    ranks |= dict.fromkeys(names, used)
        new = _config(config, rank, ranks)
        with place.passing(model, new) as name:
            place.fill(base_of(model), name, made, dtypes)
            place.copy_whole_modules(base_of(model), name, [adapter_name])
            tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    return new, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    report: Report | None = None,
) -> None:
    """Write what :func:`convert_to_lora` returns as an adapter's directory, which PEFT reads too.

    Raises:
        ValueError: ``path`` is a file; and see there.
    """
    if Path(path).is_file():
        raise AdapterError(f"Provided path ({path}) should be a directory, not a file")
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs, report=report)
    several = bool(Engines(base_of(model)).axes)
    if not several or dist.get_rank() == 0:
        Path(path).mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with at_once():
            write_tensors(Path(path) / WEIGHTS_NAME, plain, {"format": "pt"})
            config.save_pretrained(path)
    if several:
        dist.barrier()


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise AdapterError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank == 0:
        raise AdapterError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    if isinstance(rank, bool) or not isinstance(rank, int | float) or rank < 0:
        raise AdapterError(f"rank={rank!r}: a positive whole number is needed, or a share between 0 and 1")


def _checked_config(model: nn.Module, layers: list[LoraLayer], adapter: str) -> LoraConfig:
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    kinds = {layer.specs[adapter].variant: VARIANTS[layer.specs[adapter].variant] for layer in layers}
    gone = "it took a part of the base weights out for good, which plain LoRA on them would still see"
    unfit = {name: kind.unmergeable or gone for name, kind in kinds.items() if kind.unmergeable or kind.subtracts}
    if unfit:
        reasons = "; ".join(f"{name}: {unfit[name]}" for name in sorted(unfit))
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {reasons}")
    config = config_of_adapter(base_of(model), adapter)
    place.refuse_tokens(adapter, config)
    if config.bias != "none":
        raise AdapterError(f"The adapter's config sets bias={config.bias}, this is not supported right now.")
    place.refuse_start(adapter, config)
    if not any(layer.specs[adapter].variant for layer in layers):
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=3,
        )
    return config


def _config(old: LoraConfig, rank: int | float, ranks: dict[str, int]) -> LoraConfig:
    general = rank if isinstance(rank, int) else 1
    own = {name: used for name, used in ranks.items() if used != general}
    return place.plain(
        old,
        r=general,
        lora_alpha=general,
        rank_pattern=own,
        alpha_pattern=dict(own),
        use_rslora=False,
        init_lora_weights=True,
        normalize_moe_lora=False,
        loftq_config={},
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )


def _converted(layer: LoraLayer, adapter: str, rank: int | float, report: Report | None) -> tuple[Factors, int]:
    """Return a layer's new logical factors and their rank."""
    shares = shares_of(layer, adapter, 1.0)
    decomposed = [_decomposed(share) for share in shares]
    adapted = [found for share, found in zip(shares, decomposed, strict=True) if share.unit.adapted]
    groups = shares[0].unit.groups
    if isinstance(rank, int):
        if rank > min(groups * min(found.u.shape[-2], found.v.shape[-1]) for found in adapted):
            sides = min(min(found.u.shape[-2], found.v.shape[-1]) for found in adapted)
            raise AdapterError(
                f"{layer.target_name}: The chosen rank {rank} is larger than the weight shape ({sides}), please choose "
                "a lower rank."
            )
        if rank % groups:
            raise AdapterError(
                f"{layer.target_name}: the rank {rank} is not divisible by the convolution's {groups} groups"
            )
        used = rank // groups
    else:
        used = max(rank_of_energy(found.s, rank) for found in adapted)
    result: list[Unit] = []
    for share, found in zip(shares, decomposed, strict=True):
        u, s, v = cut(found, used)
        pair = padded(Pair(u * s.unsqueeze(-2), v), used)
        pair = pair if share.unit.adapted else Pair(*map(torch.zeros_like, pair))
        bias = None if share.unit.bias is None else widened(share.unit.bias) * share.scale
        result.append(replace(share.unit.of(pair), bias=bias))
        if report is not None and share.unit.adapted:
            report(Conversion(share.unit.name, used * groups, _error(found, used)))
    return joined(result), used * groups


def _error(found: Svd, rank: int) -> float:
    squares = found.s.double().square()
    total = float(squares.sum())
    return (float(squares[..., rank:].sum()) / total) ** 0.5 if total else 0.0


def _decomposed(share: Share) -> Svd:
    if share.gain is None:
        left, right = share.unit.pair
        return svd_of_product(wide(left) * share.scale, wide(right))
    return exact_svd(share.rows_of(None)(slice(None)))


__all__ = ["Conversion", "convert_to_lora", "save_as_lora"]
