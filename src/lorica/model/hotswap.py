"""Replacing an adapter's weights in a running model, compiled or not: nothing of the graph changes, only numbers.

A new adapter is written into the tensors of the old one. Where its rank is smaller, the rest of them is zero. Where its
scale is another one, B is multiplied by the ratio, so that the scale in the graph stays. The live adapter remains what
its configuration says: rank, alpha and factors together mean the new delta, and can be saved so.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lorica.adapt import inject
from lorica.checkpoint import reading
from lorica.checkpoint.loading import read_config
from lorica.checkpoint.names import Entry, adapter_entries, config_of_adapter, of_other_stages
from lorica.checkpoint.pieces import piece_of
from lorica.checkpoint.placing import write_pieces
from lorica.config import CONFIG_NAME, AdapterSpec, LoraConfig
from lorica.config.expressions import one_search
from lorica.engines.together import together
from lorica.errors import AdapterError, CheckpointError, SwapError, naming, shown
from lorica.layers import LoraLayer, Switch
from lorica.model.padding import Padded, blocks_of, check_growth, grow, is_b, rank_dim
from lorica.targets.match import pattern_value
from lorica.targets.plan import changes_base
from lorica.variants import VARIANTS

#: Fields on which two configurations have to agree.
CONFIG_KEYS_TO_CHECK = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")
#: Fields of which lorica's own adapters need the same besides.
_ALSO = ("trainable_token_indices", "lora_bias", "layer_replication")


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Refuse two configurations of which one cannot take the other's place.

    Raises:
        ValueError: names the field and both values.
    """
    if config0.peft_type != config1.peft_type:
        kinds = [getattr(config.peft_type, "value", config.peft_type) for config in (config0, config1)]
        raise AdapterError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    for key in CONFIG_KEYS_TO_CHECK:
        old, new = getattr(config0, key, None), getattr(config1, key, None)
        if (old or None) != (new or None):
            raise AdapterError(f"Configs are incompatible: for {key}, {shown(old)} != {shown(new)}")


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Give all factors the largest rank of the adapters to come, so that no swap changes a shape.

    Without this, a swap to a larger rank makes a compiled model compile again. Scales need no preparation.

    Args:
        model: an adapted model, before it is compiled and before ``fully_shard``.
        target_rank: the largest rank; None: ranks stay as they are.
        config: configurations that are to have that rank too, beside the model's own.
        check_compiled: what to do where the model is compiled already.

    Raises:
        ValueError: the model is compiled, has no adapter, or has one of a larger rank.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        _complain_of_compiled(check_compiled)
    layers = inject.lora_layers(_plain(model))
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    if target_rank is None:
        return
    own: Mapping[str, LoraConfig] = getattr(inject.base_of(_plain(model)), "peft_config", None) or {}
    given = config if isinstance(config, Mapping) else {"": config} if config is not None else {}
    with layers[0].switch.turns.writing():
        pairs = [(layer, adapter) for layer in layers for adapter in layer.specs]
        for layer, adapter in pairs:
            check_growth(layer, adapter, target_rank)
        for layer, adapter in pairs:
            grow(layer, adapter, target_rank)
        for found in (*own.values(), *given.values()):
            _set_rank(found, target_rank)


def _complain_of_compiled(check: str) -> None:
    if check == "error":
        raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if check == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
            "result in re-compilation, hurting performance. Call the function before compiling the model.",
            stacklevel=3,
        )
    elif check != "ignore":
        raise ValueError(f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check}' instead.")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put a saved adapter in the place of one that is loaded, under its name; all of it or, on an error, nothing.

    Layers that the new adapter lacks are left without one. The model's configuration of the adapter stays, with the
    rank that the factors have: the live factors are the saved ones, padded, B times the ratio of the scales.

    Args:
        model: an adapted model, compiled or not, on any layout; every rank of a divided model calls.
        model_name_or_path: a directory or a repository of the hub.
        adapter_name: which adapter is replaced.
        torch_device: accepted; factors stay where they are.
        kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir``, for the hub.

    Raises:
        ValueError: the configurations do not go together, the adapter is merged, or shapes are not what they say.
        SwapError: the file has tensors that the old adapter has no place for.
        CheckpointError: the file cannot be read, lacks a factor, or holds NaN.
    """
    plain = _plain(model)
    old, turns = _config(plain, adapter_name), (inject.switch_of(plain) or Switch()).turns
    where = os.path.join(model_name_or_path, CONFIG_NAME)
    with ExitStack() as change:
        with together(inject.base_of(plain), f"swapping in {model_name_or_path}"):
            config = read_config(model_name_or_path, None, kwargs, is_trainable=False)
            with naming(where, AdapterError):
                check_hotswap_configs_compatible(old, config)
            reader = reading.open_weights(model_name_or_path, **kwargs)
            change.enter_context(turns.changing())  # what there was to fetch is here
            with naming(where, AdapterError):
                swap = _Swap(plain, adapter_name, config, reader.shapes, str(reader.path))
            with reader.opened() as file:
                parts = swap.read({name: file.slices(name) for name in reader.tensors})
        with turns.writing():
            swap.write(parts)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put an adapter's tensors in the place of one that is loaded; see :func:`hotswap_adapter`.

    Args:
        model: an adapted model.
        state_dict: the new adapter's tensors, by their live names (``….lora_A.default.weight``) or those in a file.
        adapter_name: which adapter is replaced.
        config: of the new adapter: its ranks and alphas.
        parameter_prefix: accepted.

    Raises:
        ValueError: the adapter is merged, or shapes are not what they say.
        SwapError: there are tensors that the old adapter has no place for.
        CheckpointError: a factor is missing, or one holds NaN.
    """
    plain = _plain(model)
    turns = (inject.switch_of(plain) or Switch()).turns
    with turns.changing():
        entries = adapter_entries(plain, adapter_name, _config(plain, adapter_name))
        live = {entry.live: name for name, entry in entries.items()}
        tensors = {live.get(name, name): tensor for name, tensor in state_dict.items()}
        with together(inject.base_of(plain), f"swapping in a state dict as {adapter_name!r}"):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            swap = _Swap(plain, adapter_name, config, shapes, "the state dict")
            floating = {
                n: t.dtype for n, t in tensors.items() if n in entries and entries[n].tensor.is_floating_point()
            }
            reading.check_floating(floating, "the state dict")
            parts = swap.read(tensors)
        with turns.writing():
            swap.write(parts)


class _Change(NamedTuple):
    """What becomes of one adapted layer.

    Attributes:
        layer: it.
        rank: the new adapter's.
        ratio: what B is multiplied by.
        names: of its tensors in a file.
        absent: whether the new adapter has nothing here.
    """

    layer: LoraLayer
    rank: int
    ratio: float
    names: list[str]
    absent: bool


class _Swap:
    """One replacement: checked here, read before anything is written.

    Args:
        model: the adapted model.
        adapter: which adapter is replaced.
        config: the new one's.
        shapes: name → shape of its tensors.
        where: they come from, for messages.
    """

    @one_search()
    def __init__(
        self, model: nn.Module, adapter: str, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> None:
        self._model, self._adapter, self._config, self._where = model, adapter, config, where
        self._old = _config(model, adapter)
        self._entries = adapter_entries(model, adapter, self._old)
        theirs = of_other_stages(model, shapes)
        self._shapes = {name: shape for name, shape in shapes.items() if name not in theirs}
        _refuse(model, adapter, self._old, config)
        unexpected = [name for name in self._shapes if name not in self._entries]
        if unexpected:
            raise SwapError(
                f"{where}: Hot swapping the adapter did not succeed, unexpected keys found: "
                f"{', '.join(map(shown, unexpected[:5]))}"
                f"{'' if len(unexpected) <= 5 else f' and {len(unexpected) - 5} more'}."
            )
        self._of: dict[int, LoraLayer] = {}
        self._changes = [change for layer in inject.lora_layers(model) if (change := self._change(layer)) is not None]
        self._check_shapes()

    def _change(self, layer: LoraLayer) -> _Change | None:
        if self._adapter not in layer.specs or self._adapter in layer.tied:
            return None
        spec = layer.specs[self._adapter]
        tensors = {id(tensor) for tensor in layer.factors(self._adapter).tensors()}
        names = [name for name, entry in self._entries.items() if id(entry.tensor) in tensors and not entry.tied]
        self._of |= dict.fromkeys(tensors, layer)
        there = [name for name in names if name in self._shapes]
        if not there:
            return _Change(layer, spec.r, 1.0, names, absent=True)
        if len(there) < len(names):
            missing = sorted(set(names) - set(there))
            raise CheckpointError(f"{self._where}: {len(missing)} tensor(s) missing: {', '.join(missing[:5])}")
        first = next(name for name in names if "rank" in self._entries[name].roles)
        rank = self._rank(first, spec)
        alpha = pattern_value(self._config.alpha_pattern, layer.target_name, self._config.lora_alpha)
        scale = AdapterSpec.scale(rank, alpha, rslora=self._config.use_rslora)
        live = AdapterSpec.scale(max(rank, spec.r), spec.alpha, rslora=spec.rslora)
        if live == 0:
            raise AdapterError(
                f"{layer.target_name}: adapter {self._adapter!r} has the scale 0, which no factor changes"
            )
        return _Change(layer, rank, scale / live, names, absent=False)

    def _rank(self, name: str, spec: AdapterSpec) -> int:
        """Return the rank that a tensor in the file has."""
        got, mine, dim = self._shapes[name], self._entries[name].shape, rank_dim(self._entries[name])
        if dim is None or dim >= len(got) or not got[dim] or got[dim] * spec.r % mine[dim]:
            return spec.r  # its shape will be refused
        return got[dim] * spec.r // mine[dim]

    def _check_shapes(self) -> None:
        for change in self._changes:
            for name in () if change.absent else change.names:
                wanted = self._shape(name, change)
                if self._shapes[name] != wanted:
                    raise AdapterError(
                        f"{self._where}: Incompatible shapes found for LoRA weights {name}: {tuple(wanted)} of rank "
                        f"{change.rank} is needed, got {self._shapes[name]}"
                    )
            if change.rank > change.layer.specs[self._adapter].r:
                check_growth(change.layer, self._adapter, change.rank)
        entries = self._entries
        others = [n for n in self._shapes if id(entries[n].tensor) not in self._of and not entries[n].tied]
        for name in others:
            if self._shapes[name] != tuple(self._entries[name].shape):
                raise AdapterError(
                    f"{self._where}: {name} has the shape {self._shapes[name]}, not {tuple(self._entries[name].shape)}"
                )

    def _shape(self, name: str, change: _Change) -> tuple[int, ...]:
        """Return the shape that a tensor of the new rank has in a file."""
        entry, spec = self._entries[name], change.layer.specs[self._adapter]
        dim = rank_dim(entry)
        return tuple(size * change.rank // spec.r if place == dim else size for place, size in enumerate(entry.shape))

    def read(self, sources: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return this rank's part of everything, ready to be written.

        Raises:
            CheckpointError: a tensor is not finite.
        """
        found: dict[str, list[Tensor]] = {}
        for change in self._changes:
            rank = max(change.rank, change.layer.specs[self._adapter].r)
            for name in () if change.absent else change.names:
                entry = self._grown(name, change, rank)
                source = sources[name]
                if (dim := rank_dim(entry)) is not None and self._shapes[name] != tuple(entry.shape):
                    source = Padded(source, self._shapes[name], tuple(entry.shape), dim, blocks_of(entry, change.layer))
                parts = piece_of(name, entry).read(source)
                scaled = is_b(name) and change.ratio != 1
                parts = [part * change.ratio for part in parts] if scaled else parts
                found[name] = [reading.narrowed(part, entry.tensor.dtype) for part in parts]
        for name in self._shapes:
            if name not in found and not self._entries[name].tied:
                entry = self._entries[name]
                parts = piece_of(name, entry).read(sources[name])
                found[name] = [reading.narrowed(part, entry.tensor.dtype) for part in parts]
        for number in range(max(map(len, found.values()), default=0)):
            reading.check_finite({n: parts[number] for n, parts in found.items() if number < len(parts)}, self._where)
        return found

    def _grown(self, name: str, change: _Change, rank: int) -> Entry:
        """Return an entry as it will be when its layer has a rank."""
        entry, spec = self._entries[name], change.layer.specs[self._adapter]
        if rank == spec.r:
            return entry
        index = entry.roles.index("rank") if "rank" in entry.roles else None
        if index is None:
            return entry
        shape = list(entry.tensor.shape)
        shape[index] = shape[index] * rank // spec.r
        window = entry.window
        if window is not None and index == 0:
            window = (slice(window[0].start * rank // spec.r, window[0].stop * rank // spec.r), *window[1:])
        elif window is not None:
            window = tuple(slice(0, shape[place]) if place == index else side for place, side in enumerate(window))
        return replace(entry, tensor=torch.empty(shape, dtype=entry.tensor.dtype, device="meta"), window=window)

    @torch.no_grad()
    def write(self, parts: Mapping[str, list[Tensor]]) -> None:
        """Write what was read; nothing fails from here on."""
        grew = False
        for change in self._changes:
            if change.rank > change.layer.specs[self._adapter].r:
                grow(change.layer, self._adapter, change.rank)
                grew = True
        for layer in inject.lora_layers(self._model) if grew else ():
            if self._adapter in layer.tied:
                grow(layer, self._adapter, layer.tied[self._adapter].specs[self._adapter].r)
        if grew:
            _describe_ranks(self._old, [change.layer for change in self._changes], self._adapter)
        entries = adapter_entries(self._model, self._adapter, self._old)
        write_pieces(entries, parts)
        for change in self._changes:
            change.layer.notes.clear()
            if change.absent:
                _empty(change.layer, self._adapter)


def _plain(model: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _config(model: nn.Module, adapter: str) -> LoraConfig:
    return config_of_adapter(inject.base_of(model), adapter)


def _refuse(model: nn.Module, adapter: str, old: LoraConfig, new: LoraConfig) -> None:
    for layer in (*inject.lora_layers(model), *inject.token_layers(model)):
        merged: Sequence[str] = layer.merged_adapters  # type: ignore[assignment]
        if adapter in merged:
            raise AdapterError(
                f"Cannot hot-swap adapter '{adapter}' because it is currently merged into the base weights. Please "
                "unmerge the adapter first by calling `peft_model.unmerge_adapter()`; unmerging after a swap of merged "
                "weights would otherwise corrupt them."
            )
    for name, config in (("old", old), ("new", new)):
        for layer in inject.lora_layers(model):
            if adapter in layer.specs and (cause := changes_base(config, layer.op)):
                raise AdapterError(
                    f"{layer.target_name}: the start of the {name} adapter, {cause}, changed its base weight, which a "
                    "swap does not; turn it into plain LoRA when it is saved (path_initial_model_for_weight_conversion)"
                )
    for key in _ALSO:
        if (getattr(old, key) or None) != (getattr(new, key) or None):
            both = f"{shown(getattr(old, key))} != {shown(getattr(new, key))}"
            raise AdapterError(f"Configs are incompatible: for {key}, {both}")


@torch.no_grad()
def _empty(layer: LoraLayer, adapter: str) -> None:
    """Leave a layer without a part of an adapter: zero factors, and what a variant starts them with."""
    spec = layer.specs[adapter]
    factors = layer.factors(adapter)
    for tensor in (factors.a, factors.b, *([factors.bias] if factors.bias is not None else [])):
        tensor.zero_()
    whole = layer.whole_factors(adapter)
    for name, value in VARIANTS[spec.variant].start(layer, whole, spec, 0).items():
        factors.extras[name].copy_(value.view(factors.extras[name].shape))


def _set_rank(config: LoraConfig, rank: int) -> None:
    config.r = rank
    config.rank_pattern = dict.fromkeys(config.rank_pattern or {}, rank)


def _describe_ranks(config: LoraConfig, layers: Sequence[LoraLayer], adapter: str) -> None:
    """Say in a configuration which ranks layers have."""
    ranks = {layer.target_name: layer.specs[adapter].r for layer in layers}
    if len(set(ranks.values())) == 1:
        _set_rank(config, next(iter(ranks.values())))
    elif not config.normalize_moe_lora:
        config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items()}


__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]
