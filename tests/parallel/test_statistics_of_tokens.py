"""Layers that are whole and see their rank's tokens only start from all tokens (sequence parallelism, native)."""

from __future__ import annotations

import pytest
import ranks
import torch.distributed as dist
from contract import adapt, compare, entries, wholes
from contract_cases import STARTS
from torch.distributed.device_mesh import init_device_mesh

import lorica
from lorica.init import INITS
from lorica.parallel import parallelize, verify
from models import tiny_llama

FROM_DATA = [name for name, found in INITS.items() if found.needs]


def starts(name: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    config = lorica.LoraConfig(
        r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=name, **STARTS.get(name, {})
    )
    oracle = adapt(tiny_llama(), config)
    cut = adapt(parallelize(tiny_llama(), mesh, sequence_parallel=True, whole=("mlp",)), config)
    assert all(entry.site.layout.sequence for entry in entries(cut).values())
    verify(cut)
    compare(entries(cut), wholes(entries(oracle)), "the start", 1e-4)


@pytest.mark.parametrize("name", FROM_DATA)
def test_a_whole_block_starts_from_all_tokens(name: str) -> None:
    ranks.run(2, starts, name)
