"""Activations that are computed again, where nothing but adapters trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def let_blocks_require_grad(model: Any) -> None:
    """Make the inputs of Megatron's transformer blocks require gradients, where these recompute activations.

    Megatron's checkpoint is entered backward only if its input requires a gradient. A frozen embedding's output does
    not, and all factors inside would keep gradients of zero.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(module).__name__ == "TransformerBlock" and getattr(config, "recompute_granularity", None) is not None:
            module.register_forward_pre_hook(_require_grad, with_kwargs=True)


def _require_grad(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def changed(value: Any) -> Any:
        needed = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        return value.detach().requires_grad_(True) if needed else value

    if args:
        return (changed(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": changed(kwargs.get("hidden_states"))}
