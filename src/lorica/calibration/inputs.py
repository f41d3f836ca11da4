"""What of a batch says how factors should start: the functions that a caller may replace, and their defaults."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config import LoraConfig
from lorica.config.options import EvaConfig
from lorica.errors import ConfigError, TargetError

#: From what a layer is given (a tuple), what was made of the batch, and the layer's name, to rows ``[T, in]``.
LayerInputs = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run the model on a batch that is a dictionary of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Return the positions ``[T, 2]`` (row and token) of a batch that count: not padding, and with a label.

    Args:
        model_input: a dictionary with ``input_ids``, and perhaps ``attention_mask`` and ``labels``.
        peft_config: whose ``eva_config`` says whether labels count, and which label means none.

    Raises:
        TypeError: the batch is no dictionary.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    options = peft_config.eva_config or EvaConfig()
    labels = model_input.get("labels")
    if options.use_label_mask and labels is not None:
        mask = mask & (labels != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the rows of a layer's input ``[B, S, in]`` at the positions that count.

    Raises:
        TypeError: the layer is given no tensor.
        TargetError: it is given tokens without their places in the batch.
    """
    x = _first(layer_input, layer_name)
    if x.dim() != 3:
        raise TargetError(
            f"{layer_name}: is given a tensor of shape {tuple(x.shape)}, in which the positions of a batch cannot be "
            "found; give it a prepare_layer_inputs_fn of its own (a dictionary by names)"
        )
    return x[model_input.T.unbind()]


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Return every row of a layer's input.

    Raises:
        TypeError: the layer is given no tensor.
    """
    x = _first(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _first(layer_input: Any, layer_name: str) -> Tensor:
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if not isinstance(x, Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, "
            "please provide a custom prepare_layer_inputs_fn"
        )
    return x


class PerLayer:
    """The function for each layer.

    Args:
        given: one function for all, a dictionary by names, or None.
        names: of the layers.

    Raises:
        ConfigError: a dictionary names a layer that is not there.
    """

    def __init__(self, given: LayerInputs | Mapping[str, LayerInputs] | None, names: list[str]) -> None:
        self._given = given
        if isinstance(given, Mapping) and (unknown := sorted(set(given) - set(names))):
            raise ConfigError(
                "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                f"{unknown}"
            )

    def of(self, name: str) -> LayerInputs:
        """Return the function for a layer; all rows count where there is none."""
        if isinstance(self._given, Mapping):
            return self._given.get(name, all_rows)
        return self._given or all_rows


def made_of(
    batch: Any, prepare: Callable[[Any, LoraConfig], Any] | None, config: LoraConfig, device: torch.device | None
) -> tuple[Any, Any]:
    """Return a batch on the model's device, and what is made of it for the layers."""
    moved = batch if device is None else moved_to(batch, device)
    return moved, copy.deepcopy(moved) if prepare is None else prepare(moved, config)


def moved_to(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device, whatever it is nested in; a warning names what cannot be moved."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved_to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(moved_to(value, device) for value in batch)
    warnings.warn(f"input of type {type(batch)} could not be moved to the correct device", stacklevel=2)
    return batch


def shape_of(batch: Any) -> tuple[int, ...]:
    """Return the rows and tokens of a batch; nothing where it does not say."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return tuple(ids.shape) if isinstance(ids, Tensor) else ()


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the model's parameters; None, where there are several, with a warning."""
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    if len(devices) > 1:
        named = sorted(map(str, devices))
        warnings.warn(f"Could not determine device, model has multiple devices: {named}", stacklevel=2)
    return next(iter(devices)) if len(devices) == 1 else None


__all__ = [
    "LayerInputs",
    "PerLayer",
    "device_of",
    "forward_fn_dict",
    "made_of",
    "moved_to",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
    "shape_of",
]
