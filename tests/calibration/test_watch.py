"""Which layers are given the same tensor is known without looking at a number of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.calibration.watch import Watch, targets_of
from lorica.errors import AdapterError
from lorica.targets import make_plan


class Three(nn.Module):
    """Two layers of one input, and one of an input that lies where another lay before."""

    def __init__(self, *, shared: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(8, 8) for _ in range(3))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        first = x * 2
        y = self.q(first) + self.k(first if self.shared else first + 1)
        del first
        return self.o(y * 2)


def watch_of(model: nn.Module, seen: list[str]) -> Watch:
    plan = make_plan(model, lorica.LoraConfig(target_modules=["q", "k", "o"]))

    def record(target: object, x: Tensor, y: Tensor) -> Tensor:
        seen.append(target.name)
        return y

    return Watch(targets_of(plan), record)


def test_layers_of_one_tensor_have_one_leader() -> None:
    model, seen = Three(), []
    with watch_of(model, seen) as watch, torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 8))
    assert watch.leader == {"q": "q", "k": "q", "o": "o"}
    assert seen == ["q", "k", "o"] * 3


def test_memory_that_is_used_again_is_no_equal_input() -> None:
    memory = np.ones((4, 8), np.float32)

    class Frees(Three):
        def forward(self, x: Tensor) -> Tensor:
            first = torch.from_numpy(memory)
            y = self.q(first)
            del first
            memory[:] = 2  # as an allocator gives what was freed to the next one
            return y + self.o(torch.from_numpy(memory)) + self.k(x)

    with watch_of(model := Frees(), []) as watch, torch.no_grad():
        model(torch.randn(4, 8))
    assert watch.leader["o"] == "o"


def test_a_tensor_that_was_written_to_is_another_one() -> None:
    class Writes(Three):
        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x)
            x.add_(1)
            return self.o(y + self.k(x))

    model = Writes()
    with watch_of(model, []) as watch, torch.no_grad():
        model(torch.randn(4, 8))
    assert watch.leader["k"] == "k"


def test_an_input_that_is_no_longer_shared_is_an_error() -> None:
    model = Three()
    with watch_of(model, []), torch.no_grad():
        model(torch.randn(4, 8))
        model.shared = False
        with pytest.raises(AdapterError, match=r"k: was given the input of q"):
            model(torch.randn(4, 8))


def test_nothing_is_left_behind() -> None:
    model = Three()
    with pytest.raises(RuntimeError, match="on purpose"), watch_of(model, []):
        raise RuntimeError("on purpose")
    for layer in (model.q, model.k, model.o):
        assert "forward" not in vars(layer)
        assert not layer._forward_pre_hooks
