"""Cutting a model that has adapters already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorica.adapt.inject import AdapterModule, adapter_modules, base_of
from lorica.adapt.places import Places
from lorica.checkpoint.names import Entry, adapter_entries, config_of_adapter
from lorica.checkpoint.pieces import piece_of
from lorica.engines import Engines
from lorica.engines.duplicate import duplicate
from lorica.engines.kinds import is_distributed
from lorica.errors import AdapterError, LayoutError
from lorica.layers import ModulesToSaveWrapper, TrainableTokensWrapper
from lorica.ops import op_of
from lorica.ranks import watch
from lorica.targets.walk import bare


@contextmanager
def cutting(model: nn.Module) -> Iterator[nn.Module]:
    """Let an engine cut a model as if it had no adapters; afterwards they lie over the ranks as it does.

    ::

        with lorica.parallel.cutting(model) as base:
            parallelize_module(base, mesh, plan)

    The adapters' parameters stay the same objects, each with this rank's slice of its values, so that what was made of
    them (parameter groups, an optimiser that has not stepped) stays right. The result is that of adding the adapters
    after the cut.

    Args:
        model: an adapted model, whole on every rank; all ranks must hold the same values.

    Raises:
        AdapterError: an adapter is merged.
        LayoutError: the model lay over ranks before, or a layer cannot be found again.
    """
    base = base_of(model)
    layers = list(adapter_modules(base))
    for name, module in layers:
        if isinstance(module, ModulesToSaveWrapper):
            continue
        layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        if layer.merged:
            raise AdapterError(f"{name}: {layer.merged_adapters} are merged; unmerge them before the model is cut")
        if layer.site is not None and layer.site.layout.cuts:
            raise LayoutError(f"{name} lies over ranks already; a model is cut once")
    before = _values(base)
    places = Places(base)
    for _, module in layers:
        if not isinstance(module, ModulesToSaveWrapper):
            (module.token_adapter if isinstance(module, TrainableTokensWrapper) else module).leave()
        places.put(module, bare(module))
    try:
        yield base
    finally:
        _cover(base, layers)
    after = {adapter: _entries(base, adapter) for adapter, _ in before}
    for (adapter, name), values in before.items():
        _take_slice(name, after[adapter][name], values)
    watch(base)


def _cover(base: nn.Module, layers: list[tuple[str, AdapterModule]]) -> None:
    """Put the adapted layers back, around what now stands in the places of their base layers."""
    engines = Engines(base)
    for name, module in layers:
        cut = base.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = cut
            for adapter, old in list(module.modules_to_save.items()):
                module.modules_to_save[adapter] = new = duplicate(cut)
                new.requires_grad_(any(parameter.requires_grad for parameter in old.parameters()))
        elif isinstance(module, TrainableTokensWrapper):
            rows, op = module.token_adapter, op_of(cut)
            if op is None or op.lookup != rows.op.lookup:
                raise LayoutError(f"{name}: after the cut it is a {type(cut).__name__}, whose rows cannot train so")
            rows.base_layer, rows.op = cut, op
            rows.settle(op.place(engines, rows.target_name, cut))
        else:
            op = module.op if module.op.weight_name in cut._parameters and op_of(cut) is None else op_of(cut)
            if op is None or op.lookup != module.op.lookup:
                raise LayoutError(f"{name}: after the cut it is a {type(cut).__name__}, which its adapters do not fit")
            module.base_layer, module.op = cut, op
            module.settle(op.place(engines, module.target_name, cut))
        Places(base).put(cut, module)


def _values(base: nn.Module) -> dict[tuple[str, str], Tensor]:
    configs = getattr(base, "peft_config", {})
    return {
        (adapter, name): entry.tensor.detach()
        for adapter in configs
        for name, entry in _entries(base, adapter).items()
        if not entry.tied
    }


def _entries(base: nn.Module, adapter: str) -> dict[str, Entry]:
    return adapter_entries(base, adapter, config_of_adapter(base, adapter))


@torch.no_grad()
def _take_slice(name: str, entry: Entry, values: Tensor) -> None:
    if entry.site is None:
        return
    shape = entry.site.layout.local_shape(entry.roles, values.shape, entry.site.at)
    if not is_distributed(entry.tensor) and tuple(entry.tensor.shape) != tuple(shape):
        entry.tensor.data = values.new_empty(shape)
    piece = piece_of(name, entry)
    piece.write(piece.read(entry.saved(values)))
