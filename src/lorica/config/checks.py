"""What a ``LoraConfig`` may hold. Every check names the field, the value and what would be right."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lorica.config.options import OPTIONS, LoftQConfig
from lorica.errors import ConfigError, suggest
from lorica.init import INITS, find

if TYPE_CHECKING:
    from lorica.config.lora import LoraConfig

#: Fields that turn a variant on.
VARIANT_FIELDS = (
    *("use_dora", "kasa_config", "use_bdlora", "use_qalora", "velora_config", "monteclora_config"),
    *("arrow_config", "alora_invocation_tokens"),
)
#: What ``megatron_core`` may name. Elsewhere it is imported, so that a configuration could run whatever it names.
MEGATRON_MODULES = ("megatron.core",)


def check_lora_config(config: LoraConfig) -> None:
    """Refuse what cannot be meant or cannot be done.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another.
    """
    for check in _CHECKS:
        check(config)


def factor_dtype(config: LoraConfig) -> torch.dtype | None:
    """Return the dtype that ``lora_dtype`` names, or None."""
    return None if config.lora_dtype is None else getattr(torch, config.lora_dtype)


def _known_inits() -> list[str]:
    return [name for name in INITS if isinstance(name, str)]


def _need(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"LoraConfig.{field}={value!r}: {wanted}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_rank(config: LoraConfig) -> None:
    _need(_is_int(config.r), "r", config.r, "the rank is a whole number")
    if config.r <= 0:
        raise ConfigError(f"`r` should be a positive integer value but the value passed is {config.r}")
    _need(_is_number(config.lora_alpha), "lora_alpha", config.lora_alpha, "the scale's numerator is a finite number")
    group = config.qalora_group_size
    _need(_is_int(group) and group > 0, "qalora_group_size", group, "a group size is a positive whole number")


def _check_dropout(config: LoraConfig) -> None:
    p = config.lora_dropout
    _need(_is_number(p) and 0 <= p <= 1, "lora_dropout", p, "a probability lies between 0 and 1")
    _need(config.dropout_position in ("pre", "post"), "dropout_position", config.dropout_position, "'pre' or 'post'")


def _check_flags(config: LoraConfig) -> None:
    flags = ("fan_in_fan_out", "use_rslora", "lora_bias", "ensure_weight_tying", "inference_mode")
    for name in (*flags, "share_expert_adapters", "normalize_moe_lora", "a2a_experimental", "fused_as_one"):
        _need(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")
    for name in ("use_dora", "use_qalora"):
        _need(getattr(config, name) in (True, False, None), name, getattr(config, name), "True or False")
    if config.use_dora and config.lora_bias:
        raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
    _need(config.bias in ("none", "all", "lora_only"), "bias", config.bias, "'none', 'all' or 'lora_only'")


def _check_init(config: LoraConfig) -> None:
    init = config.init_lora_weights
    _need(isinstance(init, bool | str), "init_lora_weights", init, "True, False or a name")
    if isinstance(init, str):
        known = _known_inits()
        if find(init) is None:
            raise ConfigError(f"Unknown initialization {init!r}.{suggest(init, known)} Known: {known}")


def _check_init_options(config: LoraConfig) -> None:
    """Give an initialisation its options, as PEFT does, and say which ones have no effect."""
    if isinstance(config.loftq_config, LoftQConfig):
        config.loftq_config = dataclasses.asdict(config.loftq_config)
    for name, found in ((name, found) for name, found in INITS.items() if found.options):
        value, meant = getattr(config, found.options), find(config.init_lora_weights) is found
        if meant and not value and found.options in ("eva_config", "corda_config"):
            warnings.warn(
                f"`init_lora_weights` is {name!r} but `{found.options}` is not specified. Using its default.",
                stacklevel=5,
            )
            setattr(config, found.options, OPTIONS[found.options]())
        elif meant and not value and found.options == "loftq_config":
            raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        elif value and not meant:
            warnings.warn(
                f"`{found.options}` specified but will be ignored when `init_lora_weights` is not {name!r}.",
                stacklevel=5,
            )
            config.loftq_config = {} if found.options == "loftq_config" else config.loftq_config


def _check_variant(config: LoraConfig) -> None:
    """Refuse variants together, and starts that a variant has no room for."""
    init = config.init_lora_weights
    frozen = isinstance(init, str) and init.lower() == "mica"
    asked = [name for name in VARIANT_FIELDS if getattr(config, name)]
    if len(asked) + frozen > 1:
        both = tuple(sorted([*asked, *(["mica"] if frozen else [])]))
        raise ConfigError(f"Invalid or unsupported variant combination: {both}; an adapter has one variant at most")
    found = find(init)
    if asked == ["kasa_config"] and found is not None and found.subtracts:
        raise ConfigError(
            f"LoraConfig.init_lora_weights={init!r} and kasa_config both change the base weight; leave one of them out"
        )


def _check_invocation(config: LoraConfig) -> None:
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    wanted = "the ids of the tokens that activate the adapter: a list of whole numbers"
    _need(isinstance(tokens, list | tuple) and all(map(_is_int, tokens)), "alora_invocation_tokens", tokens, wanted)
    if config.task_type != "CAUSAL_LM":
        warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", stacklevel=2)


def _check_dtype(config: LoraConfig) -> None:
    name: Any = config.lora_dtype
    if isinstance(name, torch.dtype):
        config.lora_dtype = name = str(name).removeprefix("torch.")
    if name is not None:
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        wanted = "a floating dtype such as 'float32' or 'bfloat16'"
        _need(isinstance(dtype, torch.dtype) and dtype.is_floating_point, "lora_dtype", name, wanted)


def _check_names(config: LoraConfig) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            _check_pattern(name, value)
        elif value is not None:
            _need_names(name, value)
    if config.target_parameters is not None:
        _need_names("target_parameters", config.target_parameters)
    if config.modules_to_save is not None:
        _need(not isinstance(config.modules_to_save, str), "modules_to_save", config.modules_to_save, "a list of names")
        _need_names("modules_to_save", config.modules_to_save)


def _need_names(name: str, value: Any) -> None:
    wanted = "a list of module names"
    _need(isinstance(value, list | tuple | set | frozenset), name, value, wanted)
    _need(all(isinstance(entry, str) and entry for entry in value), name, value, wanted)


def _check_pattern(name: str, pattern: str) -> None:
    if pattern.startswith("*"):  # a wildcard; no regular expression begins so
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"LoraConfig.{name}={pattern!r} is not a valid regular expression: {error}") from error


def _check_layers(config: LoraConfig) -> None:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if isinstance(config.target_modules, str):
        if layers is not None:
            raise ConfigError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if pattern is not None:
            raise ConfigError("`layers_pattern` cannot be used when `target_modules` is a str.")
    if pattern and layers is None:
        raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
    if layers is not None:
        numbers = layers if isinstance(layers, list | tuple) else [layers]
        _need(all(map(_is_int, numbers)), "layers_to_transform", layers, "a layer number or a list of them")


def _check_replication(config: LoraConfig) -> None:
    ranges = config.layer_replication
    if ranges is None:
        return
    wanted = "a list of pairs: the first layer of a run, and the one after its last"
    _need(isinstance(ranges, list | tuple) and len(ranges) > 0, "layer_replication", ranges, wanted)
    for run in ranges:
        _need(isinstance(run, list | tuple) and len(run) == 2, "layer_replication", ranges, wanted)
        _need(all(map(_is_int, run)) and 0 <= run[0] < run[1], "layer_replication", ranges, wanted)


def _check_tokens(config: LoraConfig) -> None:
    given = config.trainable_token_indices
    if given is None:
        return
    wanted = "a list of token ids, or a mapping from the names of modules to such lists"
    _need(isinstance(given, list | tuple | dict), "trainable_token_indices", given, wanted)
    for indices in given.values() if isinstance(given, dict) else [given]:
        _need(isinstance(indices, list | tuple) and len(indices) > 0, "trainable_token_indices", given, wanted)
        good = all(_is_int(token) and token >= 0 for token in indices) and len(set(indices)) == len(indices)
        _need(good, "trainable_token_indices", given, "token ids are whole numbers from 0 on, each named once")


def _check_patterns(config: LoraConfig) -> None:
    for name, good in (("rank_pattern", _is_int), ("alpha_pattern", _is_number)):
        value = getattr(config, name)
        if value is None:
            continue
        _need(isinstance(value, dict), name, value, "a mapping from patterns to values")
        for pattern, number in value.items():
            _check_pattern(name, pattern)
            wanted = f"the value of {pattern!r} is not a number that {name.split('_')[0]} can have"
            _need(good(number) and (name == "alpha_pattern" or number > 0), name, value, wanted)


def _check_megatron(config: LoraConfig) -> None:
    core, fields = config.megatron_core, config.megatron_config
    _need(core is None or core in MEGATRON_MODULES, "megatron_core", core, f"one of {list(MEGATRON_MODULES)}, or None")
    if fields is None:
        return
    named = isinstance(fields, dict) and all(isinstance(key, str) for key in fields)
    _need(named, "megatron_config", fields, "a dictionary of fields of Megatron's TransformerConfig")
    try:
        json.dumps(fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"LoraConfig.megatron_config: its values go into a JSON file, and {error}") from None


_CHECKS: tuple[Callable[[LoraConfig], None], ...] = (
    _check_rank,
    _check_dropout,
    _check_flags,
    _check_init,
    _check_init_options,
    _check_variant,
    _check_invocation,
    _check_dtype,
    _check_names,
    _check_layers,
    _check_patterns,
    _check_replication,
    _check_tokens,
    _check_megatron,
)
