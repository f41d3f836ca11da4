"""Every start and variant on a base in 16 bits is what it is on the same values in 32, up to the base's rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract_cases import EXAMPLES, NOT_IN, RANDOM, STARTS
from torch import Tensor, nn

import lorica
from lorica.init import INITS
from lorica.variants import VARIANTS

#: A few roundings to eight bits.
TOLERANCE = 0.02
STARTING = [name for name, found in INITS.items() if not found.needs]
VARYING = [name for name in VARIANTS if name and NOT_IN.get(name, ("x",))[0]]


class Net(nn.Module):
    """Two linears, of which one is adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embed = nn.Embedding(20, 32)
        self.q_proj = nn.Linear(32, 24)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.q_proj(self.embed(input_ids))


def runs(fields: dict[str, Any], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Outputs and gradients with the base in 32 bits and in 16, whose values are the same."""
    base = Net().to(dtype).float()
    found = []
    for model in (copy.deepcopy(base), copy.deepcopy(base).to(dtype)):
        torch.manual_seed(1)
        config = lorica.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **copy.deepcopy(fields)})
        adapted = lorica.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                assert parameter.dtype == torch.float32
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        adapted.train()
        y = adapted(torch.tensor([[1, 16, 3, 7], [16, 5, 9, 2]]))
        assert y.dtype == model.q_proj.base_layer.weight.dtype
        y.float().square().mean().backward()
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in gradients.values())
        found.append({"output": y.detach(), **gradients})
    return found


def check(fields: dict[str, Any], dtype: torch.dtype) -> None:
    wide, narrow = runs(fields, dtype)
    assert wide.keys() == narrow.keys()
    for name, wanted in wide.items():
        off = float((narrow[name].float() - wanted).norm() / wanted.norm().clamp(min=1e-6))
        assert off <= TOLERANCE, f"{name}: off by {off}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STARTING, ids=str)
def test_starts(name: bool | str, dtype: torch.dtype) -> None:
    start = name.replace("_N", "_4") if isinstance(name, str) else name
    check({"init_lora_weights": start, **STARTS.get(name, {})}, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in VARYING if name not in RANDOM])
def test_variants(name: str, dtype: torch.dtype) -> None:
    check({**EXAMPLES.get(name, {name: True}), "init_lora_weights": False}, dtype)
