"""Ranks with the same part of a base weight have the same numbers in it, or stop before the first step."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lorica
import runs
from lorica import parallel
from lorica.errors import RankError

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def told(sizes: dict[str, int], odd: int) -> str:
    """What a rank is told where the ``odd``-th has another weight; -1: none has."""
    base = runs.llama()
    if dist.get_rank() == odd:
        with torch.no_grad():
            base.get_parameter(WEIGHT)[:, ::3] += 1e-3
    if sizes:
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        parallel.parallelize(base, mesh)
    torch.manual_seed(1)
    adapted = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["q_proj", "down_proj"]))
    try:
        parallel.verify(adapted)
    except RankError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("sizes", "count", "odd", "first"),
    [({}, 2, 1, 0), ({"dp": 2, "tp": 2}, 4, 3, 1), ({"dp": 2, "tp": 2}, 4, 0, 0), ({"dp": 2, "fsdp": 2}, 4, 2, 0)],
    ids=str,
)
def test_replicas_of_a_weight_are_compared(sizes: dict[str, int], count: int, odd: int, first: int) -> None:
    name = WEIGHT.removesuffix(".weight")
    for said in ranks.run(count, told, sizes, odd):
        assert said.startswith(f"rank {max(odd, 2 if odd == 0 else 0)} differs from rank {first} in the "), said
        assert f"base weights of {name}" in said, said
    assert ranks.run(count, told, sizes, -1) == [""] * count
