"""A block in which the adapters of a model stay as they are, whatever other threads do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorica.adapt.inject import switch_of
from lorica.errors import AdapterError


@contextmanager
def hold_adapters(model: nn.Module) -> Iterator[None]:
    """Let no adapter of a model be loaded, swapped, switched or deleted inside a ``with`` block.

    Any number of threads may be in such blocks at once. Those that would change an adapter wait until all have been
    left, and new blocks wait behind them. The forward and ``generate`` of a wrapped model hold its adapters themselves;
    a block is for several forwards that belong together, for a compiled model, whose graph has no locks, and for a
    model that was adapted without a wrapper.

    Inside, wait for no thread that changes adapters of the model: it waits for this block.

    Args:
        model: an adapted model, with or without a wrapper, compiled or not.

    Raises:
        AdapterError: the model has no adapters.
    """
    inner: nn.Module = getattr(model, "_orig_mod", model)
    switch = switch_of(inner)
    if switch is None:
        raise AdapterError("hold_adapters: the model has no adapters; put one in with get_peft_model")
    with switch.turns.holding():
        yield


__all__ = ["hold_adapters"]
