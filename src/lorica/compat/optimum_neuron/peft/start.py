"""One start of an adapter on all ranks, also where nobody gave them the same seed.

A start is one draw from torch's default generator. Optimum Neuron's ranks draw each for themselves, and train different
adapters where the launcher seeds nothing. Here the first rank's generator is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lorica.engines import Engines


@contextmanager
def one_start(model: nn.Module) -> Iterator[None]:
    """Let all ranks that a model lies over draw what the first one draws, inside a ``with`` block.

    Ranks whose generators were in another state have it again afterwards, so that they go on with numbers of their own.
    """
    own = torch.get_rng_state()
    states: list[Any] = [own]
    if Engines(model).axes:
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, own)
    differs = not torch.equal(states[0], own)
    if differs:
        torch.set_rng_state(states[0])
    try:
        yield
    finally:
        if differs:
            torch.set_rng_state(own)


__all__ = ["one_start"]
