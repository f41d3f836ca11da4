"""peft.utils.integrations: modules made without memory, and the plain numbers of a stored weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])

#: How many functions that are to keep their device are running.
_kept = 0


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Put the parameters that modules register inside the block on the meta device, where they have no memory.

    Args:
        include_buffers: buffers too, and every tensor that is made without naming a device.
    """
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def empty_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register_parameter(module, name, param)
        if param is not None and not _kept:
            kind: Any = type(param)
            module._parameters[name] = kind(param.to("meta"), **{**vars(param), "requires_grad": param.requires_grad})

    def empty_buffer(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        register_buffer(module, name, tensor, persistent)
        if tensor is not None and not _kept:
            module._buffers[name] = tensor.to("meta")

    nn.Module.register_parameter = empty_parameter  # type: ignore[assignment]
    if include_buffers:
        nn.Module.register_buffer = empty_buffer  # type: ignore[assignment]
    try:
        with torch.device("meta") if include_buffers else nullcontext():
            yield
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


def skip_init_on_device(func: F) -> F:
    """Return ``func`` such that the parameters that it registers keep their device inside ``init_empty_weights``."""

    @functools.wraps(func)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        global _kept
        _kept += 1
        try:
            return func(*args, **kwargs)
        finally:
            _kept -= 1

    return keeping  # type: ignore[return-value]


__all__ = ["init_empty_weights", "skip_init_on_device"]
