"""The padding token's column of A learns nothing, whichever rank has it (torch's ``padding_idx``)."""

from __future__ import annotations

import pytest
import ranks
import torch
from contract import adapt, compare, entries, gradients, wholes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lorica
from lorica.parallel import ParallelEmbedding, sum_gradients

WORDS = 11


class Net(nn.Module):
    """One embedding."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids)


def padded(padding: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(4)
    whole = nn.Embedding(WORDS, 6, padding_idx=padding)
    config = lorica.LoraConfig(r=3, init_lora_weights=False, target_modules=["embedding"])
    cut = adapt(Net(ParallelEmbedding.from_embedding(whole, mesh)), config)
    oracle = adapt(Net(whole), config)
    compare(entries(cut), wholes(entries(oracle)), "the start", 0.0)
    ids = torch.tensor([[padding, 1, 5], [9, padding, 7]])
    weights = torch.linspace(-1, 1, 36).view(2, 3, 6)
    for model in (cut, oracle):
        (model(ids) * weights).sum().backward()
    sum_gradients(cut)
    compare(gradients(cut), wholes(gradients(oracle)), "the gradient")
    learned = oracle.base_model.model.embedding.lora_embedding_A["default"].grad
    assert not learned[:, padding].any()
    assert learned[:, 5].any()


@pytest.mark.parametrize("padding", [0, 4, 8, WORDS - 1])
def test_the_padding_token_learns_nothing(padding: int) -> None:
    ranks.run(2, padded, padding)
