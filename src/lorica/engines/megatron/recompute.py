"""Activations that are computed again in the backward pass, where only adapters train.

A region that is run again has a backward pass only if one of its inputs requires a gradient; its parameters do not
count. With a frozen embedding none does, and every factor in the region would have none either, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorica.engines.megatron.models import chunks_of

_HOOKED = "lorica_input_needs_gradient"


def let_inputs_need_gradients(model: nn.Module) -> None:
    """Let what enters the layers of a model require a gradient, for as long as its activations are computed again.

    Args:
        model: the base model, or the list of its chunks.
    """
    for chunk in chunks_of(model):
        block = getattr(chunk, "decoder", None)
        if isinstance(block, nn.Module) and _HOOKED not in block.__dict__:
            block.__dict__[_HOOKED] = block.register_forward_pre_hook(_require, with_kwargs=True)


def _require(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if getattr(block.config, "recompute_granularity", None) is None or not torch.is_grad_enabled():
        return
    hidden = args[0] if args else kwargs.get("hidden_states")
    if block.training and isinstance(hidden, Tensor) and not hidden.requires_grad:
        hidden.requires_grad_()


__all__ = ["let_inputs_need_gradients"]
