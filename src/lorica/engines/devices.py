"""What kinds of devices there are, asked of torch: no kind has a name of its own here."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def backend_for(kind: str) -> str | None:
    """Return the backend of process groups that torch has for a kind of device; None: it knows none.

    Packages register theirs as they are imported: ``"neuron"`` for Trainium, for one.

    Args:
        kind: such as ``"cuda"``.
    """
    return dist.Backend.default_device_backend_map.get(kind)


def random_module(kind: str) -> Any:
    """Return torch's module of a kind of device if it has a generator there whose state can be read, or None."""
    found = torch.accelerator.current_accelerator()
    module = None if found is None or found.type != kind else torch.get_device_module(kind)
    return module if hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state") else None


def accelerator() -> str | None:
    """Return the kind of the accelerator that is there, or None."""
    found = torch.accelerator.current_accelerator()
    return None if found is None or not torch.accelerator.is_available() else found.type


__all__ = ["accelerator", "backend_for", "random_module"]
