"""What a ``LoraConfig`` may hold. Every check names the field, the value and what would be right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from lorica.config import expressions
from lorica.config.fields import quoted
from lorica.config.options import OPTIONS, LoftQConfig, options_of
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
#: What ``lora_dtype`` may name. Asking torch for any name would import some of its modules.
FLOATING = {
    name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype) and dtype.is_floating_point
}
#: A rank beyond it is no rank; a scale beyond it would turn every output into infinities.
MAX_RANK, MAX_ALPHA = 2**20, 1e9
#: Each name that may mean any module is compared with all of them, and each layer that is stacked anew is a module.
_MOST_NAMES, _MOST_LAYERS = 2000, 10_000
#: The largest mixtures of experts have some 70,000 linear layers, of which each may have a rank of its own.
_MOST_PATTERNS = 100_000
_LONGEST_INIT, _MOST_ROUNDS = 64, 1000


def check_lora_config(config: LoraConfig) -> None:
    """Refuse what cannot be meant or cannot be done.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another.
    """
    for check in _CHECKS:
        check(config)


def factor_dtype(config: LoraConfig) -> torch.dtype | None:
    """Return the dtype that ``lora_dtype`` names, or None."""
    return None if config.lora_dtype is None else FLOATING[config.lora_dtype]


def _known_inits() -> list[str]:
    return [name for name in INITS if isinstance(name, str)]


def _need(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"LoraConfig.{field}={quoted(value)}: {wanted}")


def _need_few(field: str, value: Collection[Any], most: int) -> None:
    if len(value) > most:
        raise ConfigError(f"LoraConfig.{field}: {len(value):,} entries are too many (limit {most:,})")


def _check_rank(config: LoraConfig) -> None:
    if config.r <= 0:
        raise ConfigError(f"`r` should be a positive integer value but the value passed is {config.r}")
    group = config.qalora_group_size
    _need(group > 0, "qalora_group_size", group, "a group size is a positive whole number")


def _check_dropout(config: LoraConfig) -> None:
    _need(0 <= config.lora_dropout <= 1, "lora_dropout", config.lora_dropout, "a probability lies between 0 and 1")
    if config.use_dora and config.lora_bias:
        raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")


def _check_init(config: LoraConfig) -> None:
    init = config.init_lora_weights
    if not isinstance(init, str):
        return
    if len(init) > _LONGEST_INIT or find(init) is None:
        known = _known_inits()
        raise ConfigError(
            f"Unknown initialization {quoted(init)}.{suggest(init, known)} Known: {known} (init_lora_weights)"
        )
    number = init.rpartition("_")[2]
    if number.isdecimal():
        _need(int(number) <= _MOST_ROUNDS, "init_lora_weights", init, f"at most {_MOST_ROUNDS:,} rounds")


def _check_init_options(config: LoraConfig) -> None:
    """Give an initialisation its options, as PEFT does, and say which ones have no effect."""
    if isinstance(config.loftq_config, LoftQConfig):
        config.loftq_config = dataclasses.asdict(config.loftq_config)
    config.loftq_config = config.loftq_config or {}
    if config.loftq_config:
        known = {item.name for item in dataclasses.fields(LoftQConfig)} & config.loftq_config.keys()
        options_of({name: config.loftq_config[name] for name in known}, LoftQConfig, "loftq_config")
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
            f"LoraConfig.init_lora_weights={quoted(init)} and kasa_config both change the base weight; leave one out"
        )


def _check_invocation(config: LoraConfig) -> None:
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    if config.task_type != "CAUSAL_LM":
        warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", stacklevel=2)


def _check_dtype(config: LoraConfig) -> None:
    name = config.lora_dtype
    _need(name is None or name in FLOATING, "lora_dtype", name, f"a floating dtype; one of {sorted(FLOATING)}")


def _check_names(config: LoraConfig) -> None:
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            _need(all(value), name, value, "a list of names, none of them empty")
    for name in ("target_parameters", "modules_to_save", "trainable_token_indices", "layers_pattern"):
        value = getattr(config, name)
        if isinstance(value, dict) or (isinstance(value, list | tuple) and name != "trainable_token_indices"):
            _need_few(name, value, _MOST_NAMES)


def _check_layers(config: LoraConfig) -> None:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if isinstance(config.target_modules, str):
        if layers is not None:
            raise ConfigError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if pattern is not None:
            raise ConfigError("`layers_pattern` cannot be used when `target_modules` is a str.")
    if pattern and layers is None:
        raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def _check_patterns(config: LoraConfig) -> None:
    left = _MOST_PATTERNS  # of both together
    for name, value, least, most in (
        ("rank_pattern", config.rank_pattern, 1, MAX_RANK),
        ("alpha_pattern", config.alpha_pattern, -MAX_ALPHA, MAX_ALPHA),
    ):
        if not value:
            continue
        _need_few(name, value, left)
        left -= len(value)
        for pattern, number in value.items() if min(value.values()) < least or max(value.values()) > most else ():
            if not least <= number <= most:
                what = f"the value of {quoted(pattern)} is not a number that {name.split('_')[0]} can have"
                raise ConfigError(f"LoraConfig.{name}: {quoted(number)}: {what} ({least:,} to {most:,})")


def _check_expressions(config: LoraConfig) -> None:
    whole: list[tuple[str, str, expressions.Form]] = [
        (name, value, "name")
        for name in ("target_modules", "exclude_modules")
        if isinstance(value := getattr(config, name), str) and not value.startswith("*")  # which is a wildcard
    ]
    pattern = config.layers_pattern
    layers = [pattern] if isinstance(pattern, str) else pattern or ()
    expressions.check_all(
        itertools.chain(
            whole,
            (("layers_pattern", one, "layers") for one in layers),
            (("rank_pattern", one, "ending") for one in config.rank_pattern or ()),
            (("alpha_pattern", one, "ending") for one in config.alpha_pattern or ()),
        )
    )


def _check_replication(config: LoraConfig) -> None:
    ranges = config.layer_replication
    if ranges is None:
        return
    wanted = "a list of pairs: the first layer of a run, and the one after its last"
    _need(len(ranges) > 0 and all(0 <= start < stop for start, stop in ranges), "layer_replication", ranges, wanted)
    layers = sum(stop - start for start, stop in ranges)
    if layers > _MOST_LAYERS:
        raise ConfigError(f"LoraConfig.layer_replication: {layers:,} layers are too many (limit {_MOST_LAYERS:,})")


def _check_tokens(config: LoraConfig) -> None:
    given = config.trainable_token_indices
    if given is None:
        return
    wanted = "token ids are whole numbers from 0 on, at least one, each named once"
    for indices in given.values() if isinstance(given, dict) else [given]:
        good = len(indices) > 0 and all(token >= 0 for token in indices) and len(set(indices)) == len(indices)
        _need(good, "trainable_token_indices", given, wanted)


def _check_megatron(config: LoraConfig) -> None:
    core = config.megatron_core
    _need(core is None or core in MEGATRON_MODULES, "megatron_core", core, f"one of {list(MEGATRON_MODULES)}, or None")


def _check_json(config: LoraConfig) -> None:
    """Refuse what is kept for other readers and could not be written."""
    for name in ("auto_mapping", "megatron_config", "loftq_config"):
        if value := getattr(config, name):
            _need_json(name, value)


def _need_json(name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"LoraConfig.{name}: its values go into a JSON file, and {error}") from None


_CHECKS: tuple[Callable[[LoraConfig], None], ...] = (
    _check_rank,
    _check_dropout,
    _check_init,
    _check_init_options,
    _check_variant,
    _check_invocation,
    _check_dtype,
    _check_names,
    _check_layers,
    _check_patterns,
    _check_expressions,
    _check_replication,
    _check_tokens,
    _check_megatron,
    _check_json,
)
