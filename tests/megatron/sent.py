"""Counts what ranks send to one another: calls of collectives and bytes of their tensors."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch.distributed as dist
import world
from torch import Tensor

from lorica.engines.native import collectives

NAMES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


class counting:
    """Counts collectives while it is entered, under names of torch and those that Megatron and lorica keep them by.

    Gives a counter with the calls of each and, under ``"bytes"``, those of all tensors that they were given.
    """

    def __enter__(self) -> Counter[str]:
        from megatron.core.tensor_parallel import mappings

        self.count: Counter[str] = Counter()
        self._stack = ExitStack()
        self._inside = False
        places: list[tuple[Any, str, str]] = [(dist, name, name) for name in NAMES]
        for module, prefix, suffix in ((mappings, "dist_", "_func"), (collectives, "_", "")):
            places.append((module, f"{prefix}all_gather{suffix}", "all_gather_into_tensor"))
            places.append((module, f"{prefix}reduce_scatter{suffix}", "reduce_scatter_tensor"))
        for place, attribute, name in places:
            counted = self._counted(getattr(place, attribute), name)
            self._stack.enter_context(mock.patch.object(place, attribute, counted))
        return self.count

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _counted(self, function: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one that is made of others
                return function(*args, **kwargs)
            self.count[name] += 1
            self.count["bytes"] += sum(_bytes(one) for one in (*args, *kwargs.values()))
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call


def _bytes(argument: Any) -> int:
    if isinstance(argument, list | tuple):
        return sum(_bytes(one) for one in argument)
    return argument.nbytes if isinstance(argument, Tensor) else 0


def calls(count: Counter[str]) -> int:
    """Return how many collectives there were."""
    return count.total() - count["bytes"]


def sent(models: Any) -> Counter[str]:
    """Return what a forward and a backward of one microbatch send."""
    with counting() as count:
        world.train(models, world.tokens(1))
    return count
