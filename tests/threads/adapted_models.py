"""Small adapted models, and what is asked of them in several threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from meeting import until
from torch import Tensor, nn

import lorica
from models import MLP, floats, randomise

X = floats(3, 10)
TARGETS = ["lin0", "lin1"]


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **fields)


def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval().requires_grad_(False)


def adapted(*names: str) -> lorica.PeftModel:
    model = lorica.get_peft_model(base(), config(), names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    return randomise(model).eval()


def alone(path: Path) -> Tensor:
    return compute(lorica.PeftModel.from_pretrained(base(), path).eval())


@torch.no_grad()
def compute(model: nn.Module, names: Sequence[str] | None = None, x: Tensor = X) -> Tensor:
    return model(x) if names is None else model(x, adapter_names=list(names))


def lin1(model: nn.Module) -> nn.Module:
    """A module in the middle of a forward: one adapted layer comes before it."""
    return model.get_base_model().lin1  # type: ignore[operator]


def waits(model: Any) -> None:
    """Wait until a thread waits to write."""
    until(lambda: model.base_model.switch.turns._waits)


def waiters(model: Any, count: int) -> None:
    """Wait until so many threads wait for their turns."""
    until(lambda: len(model.base_model.switch.turns._free._waiters) == count)
