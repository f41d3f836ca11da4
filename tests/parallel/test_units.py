"""Layers that are each a fully-sharded unit: what they have is whole inside their forwards only."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from contract import adapt, compare, gradients, near, wholes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lorica
from lorica.parallel import sum_gradients


class Net(nn.Module):
    """Two linears with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def units(before: bool, fields: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    config = lorica.LoraConfig(r=3, init_lora_weights=False, target_modules=["one", "two"], **fields)
    oracle, base = adapt(Net(), config), Net()

    def shard(model: Any) -> None:
        for unit in (model.one, model.two, model):
            fully_shard(unit, mesh=mesh)

    if before:
        model = adapt(base, config)
        shard(model.get_base_model())
    else:
        shard(base)
        model = adapt(base, config)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        y, wanted = model(x), oracle(x)
        near(y, wanted, "the output")
        y.square().sum().backward()
        wanted.square().sum().backward()
        sum_gradients(model)
        compare(gradients(model), wholes(gradients(oracle)), "the gradient")
        for adapted in (model, oracle):  # what DoRA keeps of its norms is no longer good
            torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.01).step()
            adapted.zero_grad()


# Of a frozen base layer's output nothing is changed in place; torch warns whenever a view is returned.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"kasa_config": {}}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("before", [True, False], ids=["adapted before", "adapted after"])
def test_each_linear_is_a_unit(before: bool, fields: dict[str, Any]) -> None:
    ranks.run(2, units, before, fields)
