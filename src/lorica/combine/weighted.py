"""``add_weighted_adapter``: one adapter of several, by each of PEFT's combination types, on every layer and layout."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from lorica.adapt.inject import adapter_modules, check_adapter_name
from lorica.adapt.trainable import check_one_bias
from lorica.combine import place
from lorica.combine.layerwise import Recipe, combined
from lorica.combine.logical import raw_factors
from lorica.combine.rules import RULES, Rule
from lorica.config import LoraConfig
from lorica.engines import fsdp
from lorica.errors import AdapterError, suggest
from lorica.kernels import draw_seed
from lorica.layers import LoraLayer, ModulesToSaveWrapper
from lorica.variants import VARIANTS, Variant

#: Every combination type.
TYPES = ("svd", "cat", *RULES, "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


def add_weighted_adapter(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Put a combination of adapters in as a new one; see :meth:`lorica.LoraModel.add_weighted_adapter`.

    Everything is computed before the model is changed.
    """
    check_adapter_name(adapter_name)
    if adapter_name in tuner.peft_config:
        warnings.warn(f"add_weighted_adapter: {adapter_name!r} is there already and stays as it is", stacklevel=3)
        return
    kind, rank = _checked(tuner, adapters, weights, combination_type, svd_rank)
    _check_svd(svd_clamp, svd_driver)
    for name in adapters:
        place.refuse_tokens(name, tuner.peft_config[name])
    fsdp.reshard(tuner.model)  # what a forward gathered is not what is kept
    if _is_copy(tuner, adapters, weights):
        _add_copy(tuner, adapters[0], adapter_name, tuner.peft_config[adapters[0]])
        return
    _check_can_be_summed(tuner, adapters)
    kept = _kept_variant(tuner, adapters)
    config = _config(tuner, adapters, rank, kept)
    check_one_bias({**tuner.peft_config, adapter_name: config})
    rule = None
    if kind in RULES or kind.removesuffix("_svd") in RULES:
        rule = Rule.of(kind.removesuffix("_svd"), density, majority_sign_method)
    seed = draw_seed() if rule is not None and rule.prune == "random" else 0
    recipe = Recipe(
        tuple(adapters),
        tuple(map(float, weights)),
        kind,
        rank,
        rule,
        svd_clamp,
        svd_driver,
        seed,
        config.lora_bias,
        kept,
    )
    layers = place.layers_of(tuner.model, list(adapters))
    names = set().union(*(place.target_names(layer, list(adapters)) for layer in layers))
    config = place.fitted(tuner.model, config, names)
    made, dtypes = {}, {}
    with torch.no_grad():
        for layer in layers:
            if place.free(layer, list(adapters)):
                made[layer.target_name] = combined(layer, recipe)
                dtypes[layer.target_name] = _dtype(layer, adapters)
    place.add_filled(tuner, adapter_name, config, made, dtypes, list(adapters))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _checked(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], kind: str, svd_rank: int | None
) -> tuple[str, int]:
    """Return the combination type that is meant, and the rank of the result."""
    configs: dict[str, LoraConfig] = tuner.peft_config
    if isinstance(adapters, str) or not adapters:
        raise AdapterError(f"adapters={adapters!r}: a list of names of adapters is needed; there are {list(configs)}")
    for name in adapters:
        if name not in configs:
            raise AdapterError(f"Adapter {name} does not exist.{suggest(name, configs)}")
    if len(weights) != len(adapters) or not all(_is_number(weight) for weight in weights):
        raise AdapterError(f"weights={weights!r}: one finite number for each of the {len(adapters)} adapters is needed")
    _refuse_shared_copies(tuner, adapters)
    if kind not in TYPES:
        raise AdapterError(f"Invalid combination_type: {kind}.{suggest(str(kind), TYPES)} Known: {list(TYPES)}")
    kind = "linear" if len(adapters) == 1 else kind
    ranks = [max([configs[name].r, *(configs[name].rank_pattern or {}).values()]) for name in adapters]
    if kind in RULES and len(set(ranks)) != 1:
        raise AdapterError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
            f"dare_linear. They have {dict(zip(adapters, ranks, strict=True))}; 'svd' and 'cat' take any."
        )
    if svd_rank is not None and (not isinstance(svd_rank, int) or isinstance(svd_rank, bool) or svd_rank < 0):
        raise AdapterError(f"svd_rank={svd_rank!r}: a positive whole number is needed, or None for the largest rank")
    if kind == "cat":
        return kind, sum(ranks)
    return kind, ranks[0] if kind in RULES else svd_rank or max(ranks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_svd(clamp: float | None, driver: str | None) -> None:
    if clamp is not None and not (_is_number(clamp) and 0 <= clamp <= 1):
        raise AdapterError(f"svd_clamp={clamp!r}: a quantile lies between 0 and 1")
    if driver not in DRIVERS:
        raise AdapterError(f"svd_driver={driver!r}: use one of {DRIVERS}")


def _refuse_shared_copies(tuner: Any, adapters: Sequence[str]) -> None:
    wrappers = [module for _, module in adapter_modules(tuner.model) if isinstance(module, ModulesToSaveWrapper)]
    shared = [w.target_name for w in wrappers if sum(name in w.modules_to_save for name in set(adapters)) > 1]
    if shared:
        raise AdapterError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s): {shared}."
        )


def _check_can_be_summed(tuner: Any, adapters: Sequence[str]) -> None:
    """Refuse adapters whose factors do not say all of what they do."""
    for name in adapters:
        config: LoraConfig = tuner.peft_config[name]
        place.refuse_start(name, config)
    shares = {
        tuner.peft_config[name].share_expert_adapters for name in adapters if tuner.peft_config[name].target_parameters
    }
    if len(shares) > 1:
        raise AdapterError(
            f"the adapters {list(adapters)} differ in share_expert_adapters: one pair for all experts and a pair for "
            "each cannot be combined"
        )


# ---- one adapter, as it is -------------------------------------------------------------------------------------------


def _is_copy(tuner: Any, adapters: Sequence[str], weights: Sequence[float]) -> bool:
    """Whether the combination is an adapter itself, and its factors alone do not say what it does."""
    if len(adapters) > 1 or weights[0] != 1:
        return False
    config: LoraConfig = tuner.peft_config[adapters[0]]
    layers = place.layers_of(tuner.model, list(adapters))
    return place.starts_in_base(config) or any(layer.specs[adapters[0]].variant for layer in layers)


def _add_copy(tuner: Any, source: str, name: str, config: LoraConfig) -> None:
    check_one_bias({**tuner.peft_config, name: config})
    made, dtypes = {}, {}
    for layer in place.layers_of(tuner.model, [source]):
        if source in layer.tied:
            continue
        factors, spec = raw_factors(layer, source), layer.specs[source]
        scale = spec.scaling / spec.natural_scaling  # set_scale is not saved either
        bias = None if factors.bias is None else factors.bias * scale
        made[layer.target_name] = factors._replace(b=factors.b * scale, bias=bias)
        dtypes[layer.target_name] = _dtype(layer, [source])
    place.add_filled(tuner, name, replace(config), made, dtypes, [source])


# ---- the configuration -----------------------------------------------------------------------------------------------


def _config(tuner: Any, adapters: Sequence[str], rank: int, kept: str) -> LoraConfig:
    configs: list[LoraConfig] = [tuner.peft_config[name] for name in adapters]
    parameters = sorted({name for config in configs for name in config.target_parameters or ()})
    saved = sorted({name for config in configs for name in config.modules_to_save or ()})
    return place.plain(
        configs[0],
        keep=kept,
        r=rank,
        lora_alpha=rank,
        target_modules=_target_modules(adapters, configs),
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,  # the scales are in the factors: α = r gives 1
        init_lora_weights=True,
        lora_bias=any(config.lora_bias for config in configs),
        ensure_weight_tying=any(config.ensure_weight_tying for config in configs),
        normalize_moe_lora=False,
    )


def _target_modules(adapters: Sequence[str], configs: Sequence[LoraConfig]) -> Any:
    targets = [config.target_modules if config.target_modules is not None else set() for config in configs]
    types = {type(target) for target in targets}
    if len(types) > 1:
        raise AdapterError(
            "all adapter configs should follow the same target modules type. Combining adapters with `target_modules` "
            f"type being a mix of list/set and string is not supported: {dict(zip(adapters, targets, strict=True))}"
        )
    if str in types:
        return "|".join(f"({target})" for target in targets)
    union: set[str] = reduce(lambda one, other: one | set(other), targets, set())
    return union or None


def _kept_variant(tuner: Any, adapters: Sequence[str]) -> str:
    """Return the variant of all the adapters where its effect is that of the factors, in a way they all share."""
    specs = [
        layer.specs[name]
        for layer in place.layers_of(tuner.model, list(adapters))
        for name in adapters
        if name in layer.specs
    ]
    first = specs[0]
    kind = type(VARIANTS[first.variant])
    alike = all(spec.variant == first.variant and spec.options == first.options for spec in specs)
    changes = (kind.plain, kind.gain, kind.extras, kind.shapes) != (
        Variant.plain,
        Variant.gain,
        Variant.extras,
        Variant.shapes,
    )
    return first.variant if alike and not changes else ""


def _dtype(layer: LoraLayer, adapters: Sequence[str]) -> torch.dtype:
    return next(layer.factors(name).b.dtype for name in adapters if name in layer.specs)


__all__ = ["TYPES", "add_weighted_adapter"]
