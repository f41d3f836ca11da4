"""The models that are measured; what is done with them, the package says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from lorica.bench.contest import LORICA, PEFT
from lorica.bench.sides import Call, adapt, adapted, config, forward, library, step, with_frozen

LIBRARIES: dict[str, Any] = {side: library(side) for side in (PEFT, LORICA)}


class Chain(nn.Module):
    """Linears of equal width, one after the other, with a ReLU between them."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def chain(layers: int, width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a seeded :class:`Chain`."""
    torch.manual_seed(0)
    return Chain(layers, width).to(dtype)


def llama(layers: int, width: int, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """Return a seeded Llama without its output layer: 7 linears per layer, half as many KV heads as query heads."""
    torch.manual_seed(0)
    heads = fields.pop("heads", max(2, width // 64))
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=fields.pop("inner", width * 11 // 4),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        use_cache=False,
        **fields,
    )
    model: nn.Module = LlamaModel(config).to(dtype)
    return model


def call_chain(model: nn.Module, x: Tensor) -> Tensor:
    """Run a :class:`Chain`."""
    y: Tensor = model(x)
    return y


def call_llama(model: nn.Module, x: Tensor) -> Tensor:
    """Run a Llama on embeddings ``[batch, tokens, width]``."""
    y: Tensor = model(inputs_embeds=x, use_cache=False).last_hidden_state
    return y


__all__ = [
    "LIBRARIES",
    "Call",
    "Chain",
    "adapt",
    "adapted",
    "call_chain",
    "call_llama",
    "chain",
    "config",
    "forward",
    "library",
    "llama",
    "step",
    "with_frozen",
]
