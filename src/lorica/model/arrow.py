"""A model whose tokens find their own way through a set of adapters (see :mod:`lorica.variants.arrow`)."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.adapt import inject
from lorica.config import LoraConfig
from lorica.config.options import ArrowConfig
from lorica.errors import AdapterError, CheckpointError
from lorica.model.peft_model import PeftModel
from lorica.ops import Op

#: Name of the adapter that routes; those that are routed to are ``task_0``, ``task_1`` …, the general ones ``gks_0`` ….
ROUTER = "arrow_router"

Source = str | os.PathLike[str]


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[Source],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[Source] | None = None,
    *,
    model_class: type[PeftModel] = PeftModel,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters into a model and a router over them, which is active.

    Args:
        base_model: the model, changed in place.
        task_specific_adapter_paths: the adapters that tokens go through: directories, or ``user/repository/folder``.
        arrow_config: of the router; it is copied.
        general_adapter_paths: adapters whose mean is taken out of the others, with ``use_gks``.
        model_class: the class of the wrapper.
        adapter_kwargs: of :meth:`PeftModel.from_pretrained` and :meth:`PeftModel.load_adapter`.

    Raises:
        AdapterError: there are no adapters, or they differ in rank, shapes or targets.
        CheckpointError: a directory holds no adapter.
        TargetError: an adapter targets a layer that is not linear.
    """
    if not task_specific_adapter_paths:
        raise AdapterError("`task_specific_adapter_paths` should contain at least one adapter path")
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    if arrow_config.use_gks and not general:
        raise AdapterError("You should provide general LoRA paths if you want to use GenKnowSub.")
    tasks = {f"task_{index}": path for index, path in enumerate(task_specific_adapter_paths)}
    others = {f"gks_{index}": path for index, path in enumerate(general)}
    (first, path), *rest = {**tasks, **others}.items()
    model = model_class.from_pretrained(base_model, adapter_name=first, **_source(path, adapter_kwargs))
    for name, path in rest:
        model.load_adapter(adapter_name=name, **_source(path, adapter_kwargs))
    config = copy.copy(arrow_config)
    config.task_adapter_names, config.gks_adapter_names = list(tasks), list(others)
    targets, r = _common(model, [*tasks, *others])
    model.add_adapter(ROUTER, LoraConfig(arrow_config=config, target_modules=targets, r=r))
    model.set_adapter(ROUTER)
    return model


def _source(path: Source, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return where an adapter is: a directory, or a repository and perhaps a folder in it."""
    if Path(path).is_dir():
        if not Path(path, "adapter_config.json").is_file():
            raise CheckpointError(f"Local adapter path '{path}' does not contain 'adapter_config.json'.")
        return {**arguments, "model_id": path}
    user, *names = str(path).strip("/").split("/")
    folder = "/".join(names[1:])
    return {**({"subfolder": folder} if folder else {}), **arguments, "model_id": "/".join([user, *names[:1]])}


def _common(model: nn.Module, names: Sequence[str]) -> tuple[list[str], int]:
    """Return what the adapters target, and their rank.

    Raises:
        AdapterError: they differ.
    """
    found: dict[str, dict[str, tuple[torch.Size, ...]]] = {name: {} for name in names}
    for layer in inject.lora_layers(model):
        for name in names:
            if name in layer.specs:
                _check_kind(layer, name)
                factors = layer.factors(name)
                found[name][layer.target_name] = (factors.a.shape, factors.b.shape)
    first = found[names[0]]
    for name, mine in found.items():
        if mine.keys() != first.keys():
            apart = sorted(mine.keys() ^ first.keys())
            raise AdapterError(f"[{name}] target_modules mismatch: it and {names[0]!r} differ on {apart[:5]}")
        for key, shapes in mine.items():
            if shapes != first[key]:
                kind = "rank" if shapes[0][0] != first[key][0][0] else "shape"
                raise AdapterError(f"[{name}] {kind} mismatch on {key}: {shapes} != {first[key]}")
    ranks = {spec.r for layer in inject.lora_layers(model) for key, spec in layer.specs.items() if key in names}
    return list(first), max(ranks)


def _check_kind(layer: Any, name: str) -> None:
    if type(layer.op).matrices is Op.matrices:
        raise TypeError(
            "LoRA adapters must only target Linear-like layers (nn.Linear, transformers' Conv1D, quantised linears). "
            f"Found:\n  - adapter '{name}' on module '{layer.target_name}' of type "
            f"{type(layer.get_base_layer()).__name__}"
        )


__all__ = ["ROUTER", "create_arrow_model"]
