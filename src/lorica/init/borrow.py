"""Starts computed where it is fast: weights visit the accelerator and stay where they are (ephemeral_gpu_offload)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_BORROWED: ContextVar[torch.device | None] = ContextVar("borrowed", default=None)


def accelerator() -> torch.device | None:
    """Return the accelerator of this machine, or None."""
    return torch.accelerator.current_accelerator(check_available=True)


@contextmanager
def borrowing(wanted: bool) -> Iterator[None]:
    """Let :func:`there` move tensors to the accelerator within the context; where there is none, nothing changes.

    Args:
        wanted: whether to, at all.
    """
    token = _BORROWED.set(accelerator() if wanted else _BORROWED.get())
    try:
        yield
    finally:
        _BORROWED.reset(token)


def there(tensor: Tensor) -> Tensor:
    """Return a tensor that lies on the CPU on the borrowed accelerator; any other, or without one, as it is."""
    device = _BORROWED.get()
    return tensor.to(device) if device is not None and tensor.device.type == "cpu" else tensor


__all__ = ["accelerator", "borrowing", "there"]
