"""Giving an adapter that is in a model other ranks and the factors that EVA found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorica.adapt.inject import adapter_modules, base_of, switch_of, target_at
from lorica.adapt.places import Places
from lorica.calibration.watch import can_be_watched
from lorica.config import AdapterSpec, LoraConfig
from lorica.engines.kinds import is_distributed
from lorica.errors import ConfigError, LayoutError
from lorica.init import Factors
from lorica.kernels import draw_seed
from lorica.layers import LoraLayer
from lorica.targets.match import shortest_names
from lorica.targets.specs import spec_for
from lorica.targets.walk import base_modules


@dataclass(frozen=True)
class _Change:
    """What happens to one layer.

    Attributes:
        name: in the base model.
        layer: it.
        rows: of A, ``[rank, in]``; None: it keeps what it has.
        spec: with the new rank.
    """

    name: str
    layer: LoraLayer
    rows: Tensor | None
    spec: AdapterSpec


def load_eva(model: nn.Module, state: Mapping[str, Tensor], adapter: str) -> None:
    """Let an adapter start from the rows of A that EVA found; B is zero.

    Args:
        model: the adapted model.
        state: the layers' names in ``model`` → rows ``[rank, in]``.
        adapter: its name.

    Raises:
        ConfigError: the rows do not fit the layer, or no layer would get any.
        LayoutError: a rank changes after the factors were sharded. Nothing was changed.
    """
    config = _config(model, adapter)
    changes = _changes(model, state, adapter, config)
    for change in changes:
        if change.rows is not None:
            _check(change, adapter)
    if not any(change.rows is None or len(change.rows) for change in changes):
        raise ConfigError("the EVA state leaves no layer a rank")
    places, seed = Places(base_of(model)), draw_seed()
    for change in changes:
        if change.rows is not None:
            _carry_out(change, adapter, places, seed)
    _write_down(model, config, changes, state)
    switch = switch_of(model)
    assert switch is not None
    switch.agreed = False
    if plain := [change.name for change in changes if change.rows is None]:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {plain}\nEVA looks at the inputs of linear layers",
            stacklevel=4,
        )


def _config(model: nn.Module, adapter: str) -> LoraConfig:
    configs: dict[str, LoraConfig] = base_of(model).peft_config  # type: ignore[assignment]
    return configs[adapter]


def _changes(model: nn.Module, state: Mapping[str, Tensor], adapter: str, config: LoraConfig) -> list[_Change]:
    adjust = config.eva_config is None or config.eva_config.adjust_scaling_factors
    found = []
    for name, module in adapter_modules(model):
        if not isinstance(module, LoraLayer) or adapter not in module.specs or adapter in module.tied:
            continue
        rows, spec = state.get(name), module.specs[adapter]
        if not can_be_watched(target_at(module, adapter)):
            rows = None
        if rows is not None and len(rows) != spec.r and len(rows):
            spec = _with_rank(spec, len(rows), adjust=adjust)
        found.append(_Change(module.target_name, module, rows, spec))
    return found


def _with_rank(spec: AdapterSpec, rank: int, *, adjust: bool) -> AdapterSpec:
    """Return the spec with another rank; ``adjust``: and the same scale (of plain LoRA)."""
    alpha = spec.alpha * rank / spec.r if adjust else spec.alpha
    return replace(spec, r=rank, alpha=alpha, scaling=AdapterSpec.scale(rank, alpha, rslora=spec.rslora))


def _check(change: _Change, adapter: str) -> None:
    layer, rows = change.layer, change.rows
    assert rows is not None
    features = layer.site.layout.sizes["in"] if layer.site is not None else layer.factors(adapter).a.shape[-1]
    if rows.dim() != 2 or rows.shape[1] != features:
        raise ConfigError(f"{change.name}: the EVA state has {tuple(rows.shape)}, not rows of {features} numbers")
    if adapter in layer.merged_adapters:
        raise ConfigError(f"{change.name}: adapter {adapter!r} is merged; unmerge it first")
    if is_distributed(layer.factors(adapter).a):
        raise LayoutError(
            f"{change.name}: its factors are sharded already; call initialize_lora_eva_weights before fully_shard"
        )


@torch.no_grad()
def _carry_out(change: _Change, adapter: str, places: Places, seed: int) -> None:
    layer, rows = change.layer, change.rows
    assert rows is not None
    old = layer.factors(adapter)
    if not len(rows):
        layer.remove_adapter(adapter)
        if not layer.specs:
            layer.leave()
            places.put(layer, layer.base_layer)
        return
    a = _of_rank(rows, change).to(old.a)
    if a.shape == old.a.shape:
        old.a.copy_(a)
        old.b.zero_()
        return
    trains = old.a.requires_grad
    bias = None if old.bias is None else torch.zeros_like(old.bias)
    b = old.b.new_zeros(*old.b.shape[:-1], len(rows))
    layer.remove_adapter(adapter)
    layer.add_adapter(adapter, change.spec, Factors(a.contiguous(), b, bias), seed=seed)
    for tensor in layer.factors(adapter).tensors():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(trains)


def _of_rank(rows: Tensor, change: _Change) -> Tensor:
    """Return this rank's slice of A: of a fused layer, one below the other for each projection that is adapted."""
    layer, spec = change.layer, change.spec
    if parts := layer.op.parts(layer.base_layer):
        rows = torch.cat([rows if not spec.parts or name in spec.parts else 0 * rows for name, _, _ in parts])
    return rows if layer.site is None else layer.site.layout.take(rows, layer.op.roles_a, layer.site.at)


def _write_down(model: nn.Module, config: LoraConfig, changes: list[_Change], state: Mapping[str, Tensor]) -> None:
    """Write ranks, scales and targets into the adapter's configuration."""
    given = {change.name: change.spec for change in changes if change.rows is not None and len(change.rows)}
    given |= _elsewhere(config, changes, state)
    ranks, alphas = {}, {}
    for name, spec in given.items():
        for written in _written(name, changes):
            before = spec_for(config, written)
            if spec.r != config.r or before.r != config.r:
                ranks[written] = spec.r
            if spec.alpha != config.lora_alpha or before.alpha != config.lora_alpha:
                alphas[written] = spec.alpha
    # The first pattern that matches counts; those of layers that EVA says nothing of stay.
    config.rank_pattern = {**ranks, **(config.rank_pattern or {})}
    config.alpha_pattern = {**alphas, **(config.alpha_pattern or {})}
    if any(not len(rows) for rows in state.values()):
        modules = {name for name, _ in base_modules(base_of(model))}
        kept = {change.name for change in changes if change.rows is None} & modules
        chosen = kept | set(given)
        config.target_modules = shortest_names(chosen, modules - chosen)


def _written(name: str, changes: list[_Change]) -> list[str]:
    """Return the names that a layer has in a configuration: of a fused one, its projections'."""
    layer = next((change.layer for change in changes if change.name == name), None)
    parts = layer.op.parts(layer.base_layer) if layer is not None else []
    parent = name.rpartition(".")[0]
    return [f"{parent}.{part}" if parent else part for part, _, _ in parts] or [name]


def _elsewhere(config: LoraConfig, changes: list[_Change], state: Mapping[str, Tensor]) -> dict[str, AdapterSpec]:
    """Return the specs of layers that another pipeline stage has."""
    mine = {change.name for change in changes}
    adjust = config.eva_config is None or config.eva_config.adjust_scaling_factors
    found = {}
    for key, rows in state.items():
        name = key.removeprefix("base_model.model.")
        if name not in mine and len(rows):
            spec = spec_for(config, name)
            found[name] = spec if len(rows) == spec.r else _with_rank(spec, len(rows), adjust=adjust)
    return found


__all__ = ["load_eva"]
