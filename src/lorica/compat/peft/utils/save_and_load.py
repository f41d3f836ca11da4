"""peft.utils.save_and_load: tensors of adapters and of the base model, under the names they have in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.adapt.inject import adapter_modules, base_of
from lorica.checkpoint.bulk import read_all
from lorica.checkpoint.loading import set_peft_model_state_dict
from lorica.checkpoint.reading import map_keys, open_weights
from lorica.checkpoint.saving import get_peft_model_state_dict
from lorica.layers import LoraLayer, TrainableTokensWrapper


class IncompatibleKeys(NamedTuple):
    """Names that were expected and not found, and found and not expected."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter, by their names in the file.

    Args:
        model_id: a directory, or a repository of the hub.
        device: where they are to lie; None: the accelerator, if there is one.
        key_mapping: regular expression → replacement, applied to the names.
        hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token`` …, for the hub.

    Raises:
        CheckpointError: there are no weights, or only a pickle, which could run code and is not read; the file is
            broken, or holds NaN or infinity.
    """
    from lorica.compat.peft.utils.other import infer_device

    found = read_all(open_weights(model_id, **hf_hub_download_kwargs))
    place = device or infer_device()
    return {new: found[old].to(place) for new, old in map_keys(found, key_mapping).items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the base model inside an adapted one, under the names that they have without adapters."""
    base = base_of(model)
    state = base.state_dict()
    return {plain: state[live] for plain, live in _names(base, state).items()}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Write tensors of the base model, named as without adapters, into an adapted model.

    Args:
        model: an adapted model.
        state_dict: the tensors.
        strict: whether missing and unexpected names are errors; otherwise they are returned.

    Raises:
        RuntimeError: names do not fit (``strict``), or a tensor has the wrong shape.
    """
    base = base_of(model)
    names = _names(base, base.state_dict())
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    complaints = [f"Missing key(s) in state_dict: {missing}"] if missing else []
    complaints += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
    if strict and complaints:
        raise RuntimeError("\n\t".join(["Error(s) in loading state_dict:", *complaints]))
    live = {names[name]: tensor for name, tensor in state_dict.items() if name in names}
    base.load_state_dict(live, strict=False)
    return IncompatibleKeys(missing, unexpected)


def _names(base: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Return, for each tensor of the base model, its name without adapters → its live name."""
    inner: dict[str, str] = {}
    for name, module in adapter_modules(base):
        if isinstance(module, TrainableTokensWrapper):
            inner |= {name: "token_adapter", f"{name}.token_adapter": "base_layer"}
        else:
            inner[name] = "base_layer" if isinstance(module, LoraLayer) else "original_module"
    found = {}
    for live in state:
        plain = _plain(live, inner)
        if plain is not None:
            found[plain] = live
    return found


def _plain(live: str, inner: Mapping[str, str]) -> str | None:
    """Return a tensor's name without what stands around modules; None for a tensor of an adapter."""
    kept: list[str] = []
    path = ""
    for part in live.split("."):
        around = inner.get(path)  # the name of the base layer inside the module that we are in
        if around is not None and part != around:
            return None
        if around is None:
            kept.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


__all__ = [
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
