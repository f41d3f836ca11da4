"""Helpers for preparing a base model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from lorica.adapt.trainable import let_inputs_require_grad
from lorica.errors import ConfigError

_QUANTISED = ("is_loaded_in_8bit", "is_loaded_in_4bit")


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
    quantised = any(getattr(model, flag, False) for flag in _QUANTISED) or getattr(model, "quantization_method", None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        packed = type(parameter).__name__ in ("Params4bit", "Int8Params")
        if parameter.dtype in (torch.float16, torch.bfloat16) and not packed:
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
