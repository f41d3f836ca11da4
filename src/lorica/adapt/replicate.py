"""Decoder layers that stand in a model several times, with one set of base weights (``layer_replication``).

``[(0, 4), (2, 5)]`` makes of layers 0 … 4 the stack 0 1 2 3 2 3 4. Each of the seven has adapters of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lorica.adapt.inject import lora_layers
from lorica.engines import Engines, fsdp
from lorica.engines.describe import DATA_AXES
from lorica.engines.duplicate import duplicate
from lorica.engines.kinds import is_distributed
from lorica.errors import AdapterError, LayoutError, TargetError
from lorica.layers import LoraLayer
from lorica.targets.walk import base_modules, tied_with_embedding

Map = tuple[tuple[int, int], ...]
#: Lists in a model's configuration that have an entry for every layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
#: Attributes of a stack of layers: what it was made by, and how to go back.
_MAP, _UNDO = "lorica_layer_replication", "lorica_replication_undo"


def replicate_layers(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Stack a model's decoder layers anew; parameters are shared, nothing is copied.

    Args:
        model: a Llama-, BERT- or Falcon-like transformers model, whole on every rank.
        ranges: first and last layer (exclusive) of each run.

    Returns:
        What puts the stack back as it was; does nothing where it was so already.

    Raises:
        TargetError: there is no stack of layers, or a range is not in it. Nothing was changed.
        LayoutError: the model is cut.
        AdapterError: the stack is another one's already, or its layers are adapted.
    """
    owner, name = _stack_of(model)
    layers: Any = getattr(owner, name)
    wanted: Map = tuple((int(start), int(stop)) for start, stop in ranges)
    if (made_by := getattr(layers, _MAP, None)) == wanted:
        return _nothing
    if made_by is not None:
        raise AdapterError(f"layer_replication={list(wanted)}: the model's layers are {list(made_by)} already")
    if lora_layers(layers):
        raise AdapterError("layer_replication: the layers are adapted already; put the adapter that needs it in first")
    _refuse_cut(model)
    for start, stop in wanted:
        if not 0 <= start < stop <= len(layers):
            raise TargetError(f"layer_replication: ({start}, {stop}) is not a range of {len(layers)} layers")
    order = [place for start, stop in wanted for place in range(start, stop)]
    stack = _stacked(layers, order)
    changed = _count_layers(owner, order, len(layers))
    setattr(owner, name, stack)

    def undo() -> None:
        setattr(owner, name, layers)
        for config, field, value in changed:
            setattr(config, field, value)

    object.__setattr__(stack, _MAP, wanted)
    object.__setattr__(stack, _UNDO, undo)
    return undo


def _stacked(layers: nn.ModuleList, order: Sequence[int]) -> nn.ModuleList:
    stack = nn.ModuleList(duplicate(layers[place], share=True) for place in order)
    stack.training = layers.training
    for place, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]  # where its keys and values are in the cache
    return stack


def restore_layers(model: nn.Module) -> None:
    """Put the stack back that :func:`replicate_layers` made anew; a model without one is left alone."""
    for module in list(model.modules()):
        if (undo := module.__dict__.get(_UNDO)) is not None:
            undo()


def _nothing() -> None:
    """Leave the stack as it is."""


def _stack_of(model: Any) -> tuple[nn.Module, str]:
    """Return the module that has the stack of layers, and its name there."""
    inner = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    prefix = getattr(inner, "base_model_prefix", "")
    inner = getattr(inner, prefix, inner) if prefix else inner
    for owner, name in ((inner, "layers"), (getattr(inner, "encoder", None), "layer"), (inner, "h")):
        if owner is not None and isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise TargetError(
        "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible architectures. "
        "(layer_replication)"
    )


def _refuse_cut(model: nn.Module) -> None:
    axes = Engines(model).axes
    if (set(axes) - set(DATA_AXES)) or fsdp.managed(model):
        raise LayoutError(
            f"layer_replication: the model lies over the axes {sorted(axes)}; add the adapter first, and cut the model "
            "inside `with lorica.parallel.cutting(model) as base:`"
        )


def _count_layers(owner: Any, order: Sequence[int], before: int) -> list[tuple[Any, str, Any]]:
    """Tell the configuration; return what it said before."""
    config: Any = getattr(owner, "config", None)
    changed = []
    if hasattr(config, "num_hidden_layers"):
        changed.append((config, "num_hidden_layers", config.num_hidden_layers))
        config.num_hidden_layers = len(order)
    for field in _PER_LAYER:
        value = getattr(config, field, None)
        if isinstance(value, list) and len(value) == before:
            changed.append((config, field, value))
            setattr(config, field, [value[place] for place in order])
    return changed


# ---- merging into shared weights -------------------------------------------------------------------------------------


@torch.no_grad()
def own_weights(model: nn.Module, names: Sequence[str], layers: Iterable[LoraLayer]) -> None:
    """Give adapted layers a copy of each parameter that they share with another one, so that a merge changes only them.

    Args:
        model: the base model. Its embedding and what is tied to it are not looked at.
        names: the adapters that are about to be merged.
        layers: the adapted layers of the model.

    Raises:
        LayoutError: a shared parameter is sharded. Nothing was changed.
    """
    if max(_holders(layers).values(), default=0) < 2:
        return
    modules = dict(base_modules(model))
    group = tied_with_embedding(model, modules)
    tied = set() if group is None else {id(modules[name]) for name in (group[0], *group[1])}
    layers = [layer for layer in layers if id(layer) not in tied]
    holders = _holders(layers)
    chosen = [layer for layer in layers if any(name in layer.specs for name in names) and not layer.merged]
    for layer in chosen:
        weight: Any = layer.get_base_layer()._parameters.get(layer.op.weight_name)
        if is_distributed(weight) and holders[id(weight)] > 1:
            raise LayoutError(
                f"{layer.target_name}: shares its weight with another layer (layer_replication), and what fully_shard "
                "manages cannot be copied; save the adapter, and merge it where the model is whole"
            )
    for layer in chosen:
        _own(layer, holders)


def _holders(layers: Iterable[LoraLayer]) -> Counter[int]:
    """Return how many base layers have each parameter, by its identity."""
    bases = {id(base): base for base in (layer.get_base_layer() for layer in layers)}
    return Counter(id(p) for base in bases.values() for p in base._parameters.values() if p is not None)


def _own(layer: LoraLayer, holders: dict[int, int]) -> None:
    parameters = layer.get_base_layer()._parameters
    for name in (layer.op.weight_name, layer.op.bias_name):
        shared = parameters.get(name)
        if shared is not None and holders[id(shared)] > 1:
            layer.shared[name] = shared
            parameters[name] = type(shared)(shared.detach().clone(), requires_grad=shared.requires_grad)


def share_again(layers: Iterable[LoraLayer]) -> None:
    """Undo :func:`own_weights`, where nothing is merged any more."""
    for layer in layers:
        if layer.shared and not layer.merged:
            layer.get_base_layer()._parameters.update(layer.shared)
            layer.shared.clear()


__all__ = ["own_weights", "replicate_layers", "restore_layers", "share_again"]
