"""What an adapter changes in a model: found out on a model without values, carried out on one tensor at a time."""

from __future__ import annotations

import copy
import functools
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorica.adapt.inject import lora_layers, prepare_to_fill, token_layers, unload
from lorica.adapt.tying import untie
from lorica.checkpoint import loading, reading
from lorica.checkpoint.names import Entry, adapter_entries, embedding_entries
from lorica.checkpoint.pieces import piece_of
from lorica.config import CONFIG_NAME
from lorica.errors import AdapterError, ConfigError, TargetError, naming
from lorica.init import Factors
from lorica.layers import LoraLayer, Switch
from lorica.layout import Roles
from lorica.merge.traced import NotFollowedError, Piece
from lorica.model import get_peft_model
from lorica.storage import Term, add_low_rank_, storage_of
from lorica.variants import VARIANTS

ADAPTER = "default"
_PREFIX = "base_model.model."
#: Layers whose factors are kept in memory: files have the parts of one layer's experts in turn.
_KEPT = 4


class Changes:
    """Everything that merging a saved adapter changes.

    Args:
        model: the base model on the meta device; it is adapted and unloaded again, as a live one would be.
        adapter: the adapter's directory.

    Attributes:
        replaced: parameters that get a new value altogether (``modules_to_save``, ``bias``, saved embeddings).
        layers: parameters that get a delta → the adapted layer.
        biases: parameters that get the bias of a B → the adapted layer.
        rows: parameters that get rows of their own for a few tokens → the rows' name in the file, and the tokens.
        groups: names of parameters that are one in the base model.
        parted: those groups that are not one any more afterwards.

    Raises:
        CheckpointError: the adapter's file does not fit the model, or holds NaN.
        TargetError: its configuration does not.
        AdapterError: B has a bias where the base layer has none.
    """

    def __init__(self, model: nn.Module, adapter: str | os.PathLike[str]) -> None:
        names = defaultdict(list)
        for name, tensor in model.state_dict(keep_vars=True).items():
            names[id(tensor)].append(name)
        modules = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            modules[id(module)].append(name)
        config = loading.read_config(adapter, None, {}, is_trainable=False)
        if config.layer_replication:
            raise AdapterError(
                f"{adapter}: layer_replication={config.layer_replication} makes new layers, which the model's files "
                "have no tensors for; load the adapter and call merge_and_unload"
            )
        self._file = reading.open_weights(adapter)
        shapes = self._file.shapes
        with naming(self._file.path.with_name(CONFIG_NAME), ConfigError, TargetError):
            wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        self._config = wrapped.peft_config[ADAPTER]
        wanted, extra = adapter_entries(wrapped, ADAPTER, self._config), embedding_entries(wrapped)
        reading.check_names(shapes, wanted, extra, where=str(self._file.path), strict=True)
        self._check_finite()
        self.replaced: dict[str, str] = {}
        self._stored: dict[int, list[tuple[str, Entry]]] = defaultdict(list)
        for key, entry in {**extra, **wanted}.items():
            if key in shapes and not entry.tied:
                self._note(key, entry, names)
        self.layers: dict[str, LoraLayer] = {}
        self.biases: dict[str, LoraLayer] = {}
        for layer in lora_layers(wrapped):
            for name in modules[id(layer.get_base_layer())]:
                self._note_layer(name, layer)
        self.rows: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tokens in token_layers(wrapped):
            key = next(n for n, e in wanted.items() if e.owner is tokens.trainable_tokens_delta)
            for name in modules[id(tokens.bare)]:
                self.rows[f"{name}.{tokens.op.weight_name}"] = (key, tokens.token_indices[ADAPTER])
        base = wrapped.get_base_model()
        untie(base, [ADAPTER])
        unload(base, [ADAPTER])
        after = base.state_dict(keep_vars=True)
        self.groups = [group for group in names.values() if len(group) > 1]
        self.parted = [group for group in self.groups if len({id(after[name]) for name in group}) > 1]
        self._factors = functools.lru_cache(maxsize=_KEPT)(self._read_factors)

    def _note(self, key: str, entry: Entry, names: Mapping[int, list[str]]) -> None:
        if entry.owner is not None:
            self._stored[id(entry.tensor)].append((key, entry))
            return
        for name in names.get(id(entry.tensor), [key.removeprefix(_PREFIX)]):
            self.replaced[name] = key

    def _note_layer(self, module: str, layer: LoraLayer) -> None:
        prefix = f"{module}." if module else ""
        self.layers[prefix + layer.op.weight_name] = layer
        if layer.specs[ADAPTER].bias:
            if layer.op.bias_of(layer.get_base_layer()) is None:
                raise AdapterError(f"{module}: B has a bias (lora_bias) and the base layer has none to merge it into")
            self.biases[prefix + layer.op.bias_name] = layer

    def _check_finite(self) -> None:
        with self._file.opened() as file:
            for key in self._file.tensors:
                reading.check_finite({key: file.slices(key)[...]}, str(self._file.path))

    @property
    def names(self) -> set[str]:
        """Every parameter that changes."""
        return {*self.replaced, *self.layers, *self.biases, *self.rows}

    def check(self, name: str, piece: Piece, shape: torch.Size, dtype: torch.dtype) -> None:
        """Refuse a piece of a parameter that the change cannot be made to.

        Args:
            name: the parameter.
            piece: of it.
            shape: of the whole parameter.
            dtype: that it is stored in.

        Raises:
            NotFollowedError: the change needs the whole parameter.
            AdapterError: no delta can be added to a weight stored so.
        """
        layer = self.layers.get(name)
        if layer is None:
            return
        storage_of(torch.empty(0, dtype=dtype), name)
        if (self._starts_from(layer) or layer.specs[ADAPTER].variant or "kernel" in layer.op.roles_weight) and (
            piece.shape != tuple(shape)
        ):
            raise NotFollowedError(f"{name}: its change needs all of it, and a stored tensor has {piece.shape} of it")

    def apply(self, name: str, weight: Tensor, box: tuple[slice, ...]) -> None:
        """Change a piece of a parameter in place.

        Args:
            name: the parameter.
            weight: the values of the piece.
            box: which piece.
        """
        if name in self.replaced:
            with self._file.opened() as file:
                weight.copy_(file.slices(self.replaced[name])[box])
        if name in self.rows:
            self._put_rows(*self.rows[name], weight, box)
        if name in self.layers:
            self._add_delta(name, self.layers[name], weight, box)
        if name in self.biases:
            layer = self.biases[name]
            bias = self._factors(layer).bias
            assert bias is not None
            weight.add_(bias[box].to(weight), alpha=layer.specs[ADAPTER].scaling)

    def _put_rows(self, key: str, indices: tuple[int, ...], weight: Tensor, box: tuple[slice, ...]) -> None:
        rows = self._file.read(key)
        for slot, token in enumerate(indices):
            if box[0].start <= token < box[0].stop:
                weight[token - box[0].start] = rows[slot, box[1]].to(weight)

    @torch.no_grad()
    def _add_delta(self, name: str, layer: LoraLayer, weight: Tensor, box: tuple[slice, ...]) -> None:
        op, spec = layer.op, layer.specs[ADAPTER]
        within = {role: part for role, part in zip(op.roles_weight, box, strict=True) if role != "kernel"}
        whole = self._factors(layer)
        parts = (
            _sliced(tensor, roles, within).to(weight.device)
            for tensor, roles in zip(whole.tensors(), layer.factor_roles(ADAPTER), strict=True)
        )
        factors = whole.renewed(parts)
        base = _holding(layer.get_base_layer(), op.weight_name, weight)
        live = LoraLayer(base, op, Switch(), layer.target_name)
        if self._starts_from(layer) and name not in self.replaced:
            live.add_adapter(ADAPTER, replace(spec, variant=""), factors)
            live.specs[ADAPTER] = spec  # its extras are not asked for, but what it takes out of the weight is
            live.owed.add(ADAPTER)
            prepare_to_fill(live, ADAPTER, self._config)
        variant = VARIANTS[spec.variant]
        gain = variant.gain(live, factors, spec)
        if gain is not None:
            gain = gain.view((-1, 1) if op.roles_weight[0] == "out" else (1, -1))
        left, right = op.delta(base, variant.plain(live, factors, spec))
        matrix = weight if "expert" in op.roles_weight else weight.flatten(1)
        add_low_rank_(matrix, [Term(left, right, spec.scaling, gain)], storage_of(weight, name))
        if matrix.data_ptr() != weight.data_ptr():
            weight.copy_(matrix.view(weight.shape))

    def _starts_from(self, layer: LoraLayer) -> bool:
        """Whether the adapter's start took something out of the base weight."""
        return ADAPTER in layer.owed

    def _read_factors(self, layer: LoraLayer) -> Factors:
        if ADAPTER in layer.tied:
            source = self._factors(layer.tied[ADAPTER])
            return Factors(source.b.T, source.a.T)
        return layer.factors(ADAPTER).map(self._read)

    @torch.no_grad()
    def _read(self, factor: Tensor) -> Tensor:
        result = torch.zeros(factor.shape, dtype=factor.dtype)
        with self._file.opened() as file:
            for key, entry in self._stored[id(factor)]:
                piece = piece_of(key, replace(entry, tensor=result))
                piece.write(piece.read(file.slices(key)))
        return result


def _sliced(tensor: Tensor, roles: Roles, within: Mapping[str, slice]) -> Tensor:
    return tensor[tuple(within.get(role, slice(None)) for role in roles)]


def _holding(module: nn.Module, name: str, weight: Tensor) -> nn.Module:
    """Return a copy of a module that shares everything but one parameter, which is ``weight``."""
    copied = copy.copy(module)
    copied._parameters = {**module._parameters, name: nn.Parameter(weight, requires_grad=False)}
    return copied


__all__ = ["ADAPTER", "Changes"]
