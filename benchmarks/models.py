"""The models that are measured, and the two libraries around them with equal factors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import lorica
from benchmarks.suite import FROZEN, LORICA, PEFT, quiet
from benchmarks.timing import Task

LIBRARIES: dict[str, Any] = {PEFT: peft, LORICA: lorica}

Call = Callable[[nn.Module, Tensor], Tensor]


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


def config(side: str, **fields: Any) -> Any:
    """Return one library's ``LoraConfig``: rank 16 on every linear, unless told otherwise."""
    return LIBRARIES[side].LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **fields})


def adapt(side: str, base: nn.Module, **fields: Any) -> nn.Module:
    """Return ``base`` adapted in place by one library."""
    with quiet():
        model: nn.Module = LIBRARIES[side].get_peft_model(base, config(side, **fields))
    return model


def adapted(base: nn.Module, **fields: Any) -> dict[str, nn.Module]:
    """Return copies of ``base`` adapted by both libraries with the same random factors (neither is zero)."""
    models = {side: adapt(side, copy.deepcopy(base), init_lora_weights=False, **fields) for side in (PEFT, LORICA)}
    with quiet():
        lorica.set_peft_model_state_dict(models[LORICA], peft.get_peft_model_state_dict(models[PEFT]))
    return models


def with_frozen(base: nn.Module, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the models and, as a third side, the base model itself with nothing to train."""
    return {FROZEN: base.requires_grad_(False), **models}


def step(model: nn.Module, call: Call, x: Tensor) -> Task:
    """Forward and backward of ``model`` for the input ``x``.

    The input requires a gradient on every side, so that backward runs through the whole frozen base too.
    """
    gradient = torch.ones_like(call(model, x)).div_(x.numel())

    def run() -> Tensor:
        y = call(model, x.detach().requires_grad_())
        y.backward(gradient)
        return y.detach()

    return Task(run, reset=lambda: model.zero_grad(set_to_none=True))


def forward(model: nn.Module, call: Call, x: Tensor) -> Task:
    """Forward without autograd."""
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return call(model, x)

    return Task(run)
