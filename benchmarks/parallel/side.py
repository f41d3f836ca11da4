"""One way of adapting a model that lies over ranks: its step, what the step sends, how long it takes beside others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.parallel.sent import Sent, sent
from benchmarks.suite import FROZEN, LORICA
from lorica.bench.timing import Task, interleave
from lorica.parallel import sum_gradients

MEGATRON, MEGATRON_A2A, LORICA_A2A = "megatron", "megatron a2a", "lorica a2a"
#: Sides whose gradients lorica sums.
OURS = (LORICA, LORICA_A2A)
PHASES = ("forward", "backward", "gradient sums")


@dataclass
class Side:
    """A model and one step of it.

    Attributes:
        model: adapted or frozen.
        call: gives its output for an input that requires a gradient.
        x: this rank's input.
    """

    model: nn.Module
    call: Callable[[Tensor], Tensor]
    x: Tensor

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return a leaf with the input, and the output."""
        x = self.x.detach().requires_grad_()
        return x, self.call(x)

    def backward(self, y: Tensor) -> None:
        """Go back from a loss that is the mean of the output."""
        y.backward(torch.full_like(y, 1 / y.numel()))

    def step(self, name: str) -> None:
        """Forward, backward, and the sums of gradients."""
        self.backward(self.forward()[1])
        if name in OURS:
            sum_gradients(self.model)

    def reset(self) -> None:
        """Forget the gradients; wait for all ranks."""
        self.model.zero_grad(set_to_none=True)
        dist.barrier()


def results(sides: Mapping[str, Side]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the output of each side and the gradient of its input."""
    found = {}
    for name, side in sides.items():
        x, y = side.forward()
        side.backward(y)
        assert x.grad is not None
        found[name] = (y.detach(), x.grad)
        side.reset()
    return found


def check_equal(sides: Mapping[str, Side], tolerance: float = 1e-5) -> None:
    """Refuse to compare sides that do not compute the same, the frozen base apart.

    Raises:
        AssertionError: names the sides.
    """
    found = {name: pair for name, pair in results(sides).items() if name != FROZEN}
    wanted = found[LORICA]
    for name, pair in found.items():
        for got, want, what in zip(pair, wanted, ("output", "input gradient"), strict=True):
            apart = float((got - want).norm() / want.norm())
            assert apart <= tolerance, f"{name}: the {what} is {apart:.1e} off lorica's, relatively"


def count(name: str, side: Side) -> dict[str, Sent]:
    """Return what one step sends, by phase: not the first, before which lorica's ranks compare their adapters."""
    side.reset()
    side.step(name)
    side.reset()
    (_, y), forward = sent(side.forward)
    _, backward = sent(lambda: side.backward(y))
    _, sums = sent(lambda: sum_gradients(side.model) if name in OURS else None)
    return dict(zip(PHASES, (forward, backward, sums), strict=True))


def flops(name: str, side: Side) -> int:
    """Return the FLOPs of a step on this rank."""
    side.reset()
    with FlopCounterMode(display=False) as counter:
        side.step(name)
    return int(counter.get_total_flops())


def seconds(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a step in each round, sides interleaved; every rank does the same rounds."""
    tasks: dict[str, Task] = {name: Task(_step(name, side), side.reset) for name, side in sides.items()}
    return interleave(tasks, rounds, budget=math.inf)


def _step(name: str, side: Side) -> Callable[[], Any]:
    return lambda: side.step(name)
