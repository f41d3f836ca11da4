"""Helpers: preparing a base model, and contexts around an adapted one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorica.adapt.inject import lora_layers
from lorica.adapt.trainable import let_inputs_require_grad
from lorica.config.base import CONFIG_NAME
from lorica.errors import AdapterError, CheckpointError, ConfigError
from lorica.files.hub import find_file
from lorica.files.json import read_json_object
from lorica.storage import kind_of
from lorica.variants import dora

_QUANTISED = ("is_loaded_in_8bit", "is_loaded_in_4bit")
#: Methods whose kernels want the rest of the model in the dtype that they were made for.
_AS_THEY_ARE = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a (quantised) base model ready: freeze it, widen 16-bit parameters to float32, turn checkpointing on.

    Args:
        model: a transformers model.
        use_gradient_checkpointing: recompute activations in the backward pass, for quantised models.
        gradient_checkpointing_kwargs: arguments of ``torch.utils.checkpoint`` (``{"use_reentrant": False}``).
        auto_clear_cache: free the accelerator's cache of memory that the widening left.

    Returns:
        The same model.
    """
    method = getattr(model, "quantization_method", None) or ("hqq" if getattr(model, "hqq_quantized", False) else None)
    quantised = any(getattr(model, flag, False) for flag in _QUANTISED) or method
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        wide = parameter.dtype not in (torch.float16, torch.bfloat16)
        if not (wide or kind_of(type(parameter)) is not None or method in _AS_THEY_ARE):
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if quantised and use_gradient_checkpointing:
        _enable_checkpointing(model, gradient_checkpointing_kwargs or {})
    return model


def _enable_checkpointing(model: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_reentrant", True):
        let_inputs_require_grad(model)
    enable = model.gradient_checkpointing_enable
    accepts = "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters
    enable(**({"gradient_checkpointing_kwargs": kwargs} if accepts else {}))


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what does not train to ``dtype`` and what trains to float32, for mixed-precision training.

    Args:
        model: an adapted model.
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        ConfigError: ``dtype`` is not a floating dtype.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"cast_mixed_precision_params: {dtype} is not a floating dtype")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


class MontecloraTrainerMixin:
    """Adds MonteCLoRA's variational loss to a trainer's: ``class MyTrainer(MontecloraTrainerMixin, Trainer): ...``.

    For transformers' ``Trainer`` and what derives from it. Without such adapters nothing changes.
    """

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the trainer's loss plus the variational loss of the active adapters, and the outputs if asked for.

        Args:
            model: the adapted model, wrapped or not; of several tuners in it the losses are averaged.
            inputs: a batch.
            return_outputs: whether to return the outputs too.
            kwargs: the trainer's own.
        """
        trainer: Any = super()
        found = trainer.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        tuners: list[Any] = [module for module in model.modules() if getattr(type(module), "holds_adapters", False)]
        variational = sum(tuner._get_monteclora_loss() for tuner in tuners) / max(1, len(tuners))
        if return_outputs:
            loss, outputs = found
            return loss + variational, outputs
        return found + variational


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a directory, or a repository of the hub, holds an adapter of any method."""
    try:
        return isinstance(read_json_object(find_file(model_name_or_path, CONFIG_NAME)).get("peft_type"), str)
    except (CheckpointError, OSError, ValueError):
        return False


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scale of every adapter by a number inside a ``with`` block (https://arxiv.org/abs/2109.01903).

    Args:
        model: an adapted model, with a wrapper or without.
        multiplier: any number; between 0 and 1 it goes between the base model and the adapted one.

    Raises:
        TypeError: ``multiplier`` is no number.
        ValueError: nothing in the model is adapted, or an adapter is merged with its present scale.
    """
    if not isinstance(multiplier, float | int):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = lora_layers(model)
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    for layer in layers:
        if layer.merged:
            raise AdapterError(f"{layer.target_name}: {layer.merged_adapters} are merged; unmerge before scaling")
    turns = layers[0].switch.turns
    with turns.writing():
        before = [(layer, dict(layer.specs)) for layer in layers]
        for layer, specs in before:
            layer.specs.update({n: replace(spec, scaling=spec.scaling * multiplier) for n, spec in specs.items()})
    try:
        yield
    finally:
        with turns.writing():
            for layer, specs in before:
                layer.specs.update({name: spec for name, spec in specs.items() if name in layer.specs})


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Leave the dtype of inputs alone inside a ``with`` block; it is never touched, so there is nothing to do.

    Factors take the dtype of the base layer's output in each forward, whatever they are stored in.

    Args:
        model: an adapted model.
        active: whether the block has its effect.
    """
    yield


class DoraCaching:
    """Keep the norms of DoRA from one forward to the next: as a context, or for good when it is called.

    They are kept by default, in training too, and taken anew when anything that they depend on was written to. Switched
    off they are taken in every forward, for code that writes through ``.data``, which nothing sees.

    Args:
        enabled: whether they are kept inside the context.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(dora.keeps_norms)
        dora.keeps_norms = self.enabled

    def __exit__(self, *error: object) -> None:
        dora.keeps_norms = self._before.pop()

    def __call__(self, enabled: bool = True) -> None:
        """Keep norms from now on, or not."""
        dora.keeps_norms = enabled
