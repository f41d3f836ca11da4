"""Putting a computed adapter into a model, for good or for as long as its tensors are collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt import inject
from lorica.combine.logical import check_shapes, sliced
from lorica.config import LoraConfig
from lorica.engines.stages import axis_of_stages
from lorica.errors import AdapterError
from lorica.init import Factors, find, subtracts
from lorica.layers import LoraLayer, ModulesToSaveWrapper, Switch
from lorica.targets import make_plan
from lorica.targets.match import shortest_names
from lorica.targets.plan import Plan
from lorica.targets.walk import base_modules
from lorica.variants import VARIANTS, variant_of


class Tuner(Protocol):
    """What is asked of a ``LoraModel``."""

    model: nn.Module
    peft_config: dict[str, LoraConfig]
    switch: Switch

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, low_cpu_mem_usage: bool = ...) -> None:
        """Put a further adapter in."""


def layers_of(model: nn.Module, adapters: list[str]) -> list[LoraLayer]:
    """Return the layers that hold factors of any of the adapters; where they are another's, that one is meant."""
    return [layer for layer in inject.lora_layers(model) if any(name in layer.specs for name in adapters)]


def free(layer: LoraLayer, adapters: list[str]) -> bool:
    """Whether a layer holds the factors itself, rather than sharing those of the embedding that it is tied to.

    Raises:
        AdapterError: some of the adapters are tied there and some are not.
    """
    here = [name for name in adapters if name in layer.specs]
    tied = [name for name in here if name in layer.tied]
    if tied and len(tied) < len(here):
        raise AdapterError(
            f"{layer.target_name}: the adapters {tied} share the embedding's factors here (ensure_weight_tying) and "
            f"{[name for name in here if name not in tied]} have their own; they have no common form"
        )
    return not tied


def fitted(model: nn.Module, config: LoraConfig, names: set[str]) -> LoraConfig:
    """Return a configuration whose targets are exactly ``names``, changed no more than needed.

    Args:
        model: the base model.
        config: what is wanted otherwise.
        names: full names of the layers (of fused ones: of the projections).

    Raises:
        AdapterError: no list of names means these layers alone.
    """
    names, fits = _everywhere(model, names, _targets(make_plan(model, config)) == names)
    if fits:
        return config
    modules = dict(base_modules(model))
    stacks = set(config.target_parameters or ())
    own = {name for name in names if not any(name == entry or name.endswith(f".{entry}") for entry in stacks)}
    config = replace_config(
        config,
        target_modules=shortest_names(own, modules.keys() - own) if own else None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    more = _targets(make_plan(model, config)) - names
    if more:
        raise AdapterError(f"no target_modules mean exactly {sorted(names)}; they also mean {sorted(more)}")
    return config


def _everywhere(model: nn.Module, names: set[str], fits: bool) -> tuple[set[str], bool]:
    """Return the names of all stages of a pipeline, and whether a configuration fits all of them."""
    axis = axis_of_stages(model)
    if axis is None or axis.size == 1:
        return names, fits
    found: list[Any] = [None] * axis.size
    dist.all_gather_object(found, (names, fits), group=axis.group)
    return set().union(*(there for there, _ in found)), all(fit for _, fit in found)


def replace_config(config: LoraConfig, **fields: Any) -> LoraConfig:
    """Return a copy of a configuration with other values, checked."""
    return replace(config, **fields)


def _targets(plan: Plan) -> set[str]:
    return {
        name for target in plan.targets for name in names_of(target.name, target.op.parts(target.base), target.spec)
    }


def names_of(name: str, parts: list[tuple[str, int, int]], spec: Any) -> list[str]:
    """Return the names by which a layer is a target: its own, or those of the projections fused in it."""
    if not parts:
        return [name]
    parent = name.rpartition(".")[0]
    wanted = [part for part, _, _ in parts if not spec.parts or part in spec.parts]
    return [f"{parent}.{part}" if parent else part for part in wanted]


def target_names(layer: LoraLayer, adapters: list[str]) -> set[str]:
    """Return the names by which the adapters have a layer as their target."""
    parts = layer.op.parts(layer.base_layer)
    return {
        name for key in adapters if key in layer.specs for name in names_of(layer.target_name, parts, layer.specs[key])
    }


def starts_in_base(config: LoraConfig) -> bool:
    """Whether an adapter's start took something out of the base weights (PiSSA and its like, KaSA)."""
    if VARIANTS[variant_of(config)].subtracts:
        return True
    return find(config.init_lora_weights) is not None and subtracts(config.init_lora_weights, lookup=False)


def refuse_start(adapter: str, config: LoraConfig) -> None:
    """Refuse an adapter whose factors mean something only beside base weights that its start has changed.

    Raises:
        AdapterError: names the field, and the way to plain LoRA if there is one.
    """
    if not starts_in_base(config):
        return
    field = variant_of(config) if VARIANTS[variant_of(config)].subtracts else ""
    start = field or f"init_lora_weights={config.init_lora_weights!r}"
    way = (
        "" if field else ": turn it into plain LoRA first, save_pretrained(path_initial_model_for_weight_conversion=…)"
    )
    raise AdapterError(
        f"adapter {adapter!r} started with {start}, which took its start out of the base weights; its factors mean "
        f"something beside those weights only{way}"
    )


def refuse_tokens(adapter: str, config: LoraConfig) -> None:
    """Refuse an adapter that trains rows of an embedding, which are no low-rank change of it.

    Raises:
        AdapterError: names the field.
    """
    if config.trainable_token_indices is not None:
        raise AdapterError(
            f"adapter {adapter!r} has trainable_token_indices={config.trainable_token_indices!r}: rows that are "
            "trained for themselves can be neither combined nor converted"
        )


def fill(model: nn.Module, adapter: str, made: Mapping[str, Factors], dtypes: Mapping[str, torch.dtype]) -> None:
    """Give an adapter that was put in without values its values.

    Args:
        model: the base model.
        adapter: its factors are on the meta device.
        made: full name of a layer → its logical factors.
        dtypes: full name of a layer → the dtype to keep them in.
    """
    for layer in layers_of(model, [adapter]):
        if adapter in layer.tied:
            continue
        factors = made[layer.target_name]
        if not factors.extras:
            check_shapes(layer, factors, layer.specs[adapter])
        local = sliced(layer, factors, layer.factor_roles(adapter))
        device, dtype = layer.base_weight.device, dtypes[layer.target_name]
        for live, tensor in zip(layer.factor_names(adapter).values(), local.tensors(), strict=True):
            _set(layer, live, tensor.detach().to(device, dtype).contiguous())
        layer.owed.discard(adapter)  # the base weights were changed for it when it started
        layer.notes.clear()


def _set(layer: LoraLayer, live: str, value: Tensor) -> None:
    path, _, leaf = live.rpartition(".")
    owner = layer.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
        return
    old = owner._parameters[leaf]
    assert old is not None
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)


def copy_whole_modules(model: nn.Module, adapter: str, sources: list[str]) -> None:
    """Give an adapter's copies of whole modules the values of the one adapter that trained each."""
    for _, module in inject.adapter_modules(model):
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            found = [name for name in sources if name in module.modules_to_save]
            if found:
                _copy(module.modules_to_save[found[0]], module.modules_to_save[adapter])


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    values = source.state_dict(keep_vars=True)
    for name, tensor in target.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor is not values[name]:
            tensor.copy_(values[name])


def add_filled(
    tuner: Tuner,
    adapter: str,
    config: LoraConfig,
    made: Mapping[str, Factors],
    dtypes: Mapping[str, torch.dtype],
    sources: list[str],
) -> None:
    """Put a computed adapter into a model; it is not active. On an error the model is as it was.

    Args:
        tuner: the ``LoraModel``.
        adapter: the new adapter's name.
        config: its configuration, as it is to be saved.
        made: full name of a layer → its logical factors.
        dtypes: full name of a layer → the dtype to keep them in.
        sources: adapters whose copies of whole modules it gets.
    """
    with tuner.switch.turns.writing():
        tuner.add_adapter(adapter, as_injected(config), True)
        try:
            fill(tuner.model, adapter, made, dtypes)
            copy_whole_modules(tuner.model, adapter, sources)
        except Exception:
            inject.take_out(tuner.model, adapter)
            del tuner.peft_config[adapter]
            raise
        for name in _OF_THE_START:
            setattr(tuner.peft_config[adapter], name, getattr(config, name))


#: Fields that are carried out when an adapter is put in → their values for one whose start was long ago.
_OF_THE_START: dict[str, Any] = {
    "init_lora_weights": True,
    "layer_replication": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


def as_injected(config: LoraConfig) -> LoraConfig:
    """Return a configuration to inject now: the base weights and layers were made ready for it when it started."""
    return replace_config(config, **_OF_THE_START)


def plain(config: LoraConfig, *, keep: str = "", **fields: Any) -> LoraConfig:
    """Return a configuration with other values and without a variant, except for ``keep``."""
    off: dict[str, Any] = dict.fromkeys((field for field in VARIANTS if field and field != keep), None)
    off |= {name: False for name in ("use_dora", "use_qalora") if name in off}
    return replace_config(config, **off, **fields)


@contextmanager
def passing(model: nn.Module, config: LoraConfig) -> Iterator[str]:
    """Have a further adapter in a model for the length of a block, on the meta device; yield its name.

    Args:
        model: an adapted model, with or without its wrappers.
        config: the adapter's.
    """
    base = inject.base_of(model)
    configs: dict[str, LoraConfig] = base.peft_config  # type: ignore[assignment]
    name = "passing"
    while name in configs:
        name += "_"
    switch = inject.switch_of(base)
    assert switch is not None
    injected = as_injected(config)
    with switch.turns.writing():
        inject.inject(base, make_plan(base, injected), injected, name, switch, on_meta=True)
        configs[name] = injected
        try:
            yield name
        finally:
            inject.take_out(base, name)
            del configs[name]
