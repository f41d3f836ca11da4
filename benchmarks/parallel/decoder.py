"""Llama-like decoder layers of native parallel linears, adapted by each of the ways that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lorica
from benchmarks.parallel.megatron import TOKENS, MegatronLora
from benchmarks.parallel.side import LORICA_A2A, MEGATRON, MEGATRON_A2A, Side
from benchmarks.suite import FROZEN, LORICA
from lorica.engines.native import ColumnParallelLinear, RowParallelLinear
from lorica.engines.site import Axis
from lorica.layout import fused

RANK, SCALE = 16, 2.0
NAMES = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class Sizes:
    """What the layers are like; ``tokens`` in each of ``batch`` sequences."""

    width: int
    heads: int
    inner: int
    batch: int
    tokens: int
    layers: int = 2


class Layer(nn.Module):
    """Attention and a gated MLP of four linears, those of q, k, v and of gate, up in one, as Megatron has them.

    Half as many key/value heads as query heads; no positions, which need nothing from other ranks.
    """

    def __init__(self, sizes: Sizes, axis: Axis, *, sequence: bool) -> None:
        super().__init__()
        width, inner, kv = sizes.width, sizes.inner, sizes.width // 2
        self.head_dim = width // sizes.heads
        self.rows = (width // axis.size, kv // axis.size, kv // axis.size)
        common: dict[str, Any] = {
            "bias": False,
            "axis": axis,
            "sequence_parallel_enabled": sequence,
            "sequence_dimension": TOKENS,
        }
        column, row = {**common, "gather_output": False}, {**common, "input_is_parallel": True}
        qkv = fused(axis.name, "out", (width, kv, kv), axis.size)
        gated = fused(axis.name, "out", (inner, inner), axis.size)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = ColumnParallelLinear(width, width + 2 * kv, cut=qkv, **column)
        self.proj = RowParallelLinear(width, width, **row)
        self.fc1 = ColumnParallelLinear(width, 2 * inner, cut=gated, **column)
        self.fc2 = RowParallelLinear(inner, width, **row)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        parts = self.qkv(self.norms[0](x)).split(self.rows, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        gate, up = self.fc1(self.norms[1](x)).chunk(2, -1)
        return x + self.fc2(F.silu(gate) * up)


class Decoder(nn.Module):
    """Layers one after the other, frozen, the same logical weights in every call."""

    def __init__(self, sizes: Sizes, axis: Axis, *, sequence: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(sizes, axis, sequence=sequence) for _ in range(sizes.layers))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream."""
        for layer in self.layers:
            x = layer(x)
        return x


def sides(sizes: Sizes, *, sequence: bool) -> dict[str, Side]:
    """Return the frozen layers and every way of adapting them, with equal logical factors."""
    axis = Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), 0)
    x = torch.randn(sizes.batch, sizes.tokens, sizes.width, generator=torch.Generator().manual_seed(1))
    if sequence:
        x = x.chunk(axis.size, TOKENS)[axis.rank].contiguous()
    makers: dict[str, Callable[[Decoder], nn.Module]] = {FROZEN: lambda model: model, MEGATRON: _megatron}
    if sequence:
        makers[MEGATRON_A2A] = partial(_megatron, a2a=True)
    makers[LORICA] = _lorica
    if sequence:
        makers[LORICA_A2A] = partial(_lorica, a2a=True)
    models = {name: make(Decoder(sizes, axis, sequence=sequence)) for name, make in makers.items()}
    return {name: Side(model, partial(_call, model), x) for name, model in models.items()}


def _call(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


def factors_of(model: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the logical A and B of every adapted layer, by its name."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in NAMES:
            shapes = (RANK, module.input_size), (module.output_size, RANK)
            a, b = (torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in shapes)
            found[name] = (a, b)
    return found


def _megatron(model: Decoder, *, a2a: bool = False) -> nn.Module:
    for name, (a, b) in factors_of(model).items():
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, MegatronLora(layer, a, b, SCALE, a2a=a2a))
    return model


def _lorica(model: Decoder, *, a2a: bool = False) -> nn.Module:
    factors = factors_of(model)
    config = lorica.LoraConfig(
        r=RANK, lora_alpha=RANK * SCALE, target_modules=list(NAMES), a2a_experimental=a2a, init_lora_weights=False
    )
    adapted = lorica.get_peft_model(model, config)
    prefix = "base_model.model"
    state = {f"{prefix}.{name}.lora_A.weight": a for name, (a, _) in factors.items()}
    state |= {f"{prefix}.{name}.lora_B.weight": b for name, (_, b) in factors.items()}
    lorica.set_peft_model_state_dict(adapted, state)
    return adapted
