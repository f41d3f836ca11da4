"""Stand-ins for Megatron's linears over Transformer Engine, which needs a GPU: what lorica asks of them, in torch.

They have the names, the bases, the attributes and the collectives of ``TEColumnParallelLinear``,
``TERowParallelLinear``, ``TELayerNormColumnParallelLinear`` and ``TELinear``: collectives inside ``forward``, and none
where the layer is alone (``parallel_mode=None``, ``tp_size=1``); an empty tensor for a bias that is not there.
:func:`rebuild` puts them into a tiny GPT in the place of its own layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gpt import HIDDEN, drawn
from torch import Tensor, nn


class Linear(nn.Module):
    """Transformer Engine's own, with its collectives inside."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mode: str | None = None, group: Any = None) -> None:
        super().__init__()
        self.parallel_mode, self.tp_group, self.tp_size = mode, group, 1 if group is None else group.size()
        self.sequence_parallel = False
        self.weight, self.use_bias, self.return_bias = weight, bias is not None, False
        self.bias = torch.Tensor() if bias is None else bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Any:
        y = self._linear(x)
        return (y, self.bias) if self.return_bias else y

    def _linear(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        group, alone = self.tp_group, self.tp_size == 1
        inside = self.bias if self.use_bias and not self.return_bias else None
        if self.parallel_mode == "column" and not alone:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        y = F.linear(x, self.weight, inside)
        if self.parallel_mode == "row" and not alone:
            if self.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
            return mappings.reduce_from_tensor_model_parallel_region(y, group=group)
        return y


class LayerNormLinear(Linear):
    """A normalisation and a linear layer in one."""

    return_layernorm_output = False
    layer_norm_weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Any:
        normed = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        found = (self._linear(normed), *([self.bias] if self.return_bias else []))
        found = (*found, normed) if self.return_layernorm_output else found
        return found if len(found) > 1 else found[0]


def _as_megatrons(layer: Any, own: Any) -> None:
    layer.config, layer._tp_group = own.config, own.tp_group
    layer.sequence_parallel = own.config.sequence_parallel and layer.tp_size > 1
    layer.te_return_bias = layer.return_bias = own.skip_bias_add and layer.use_bias


class TELinear(Linear):
    """A linear layer made of one of Megatron-Core's own."""

    def __init__(self, own: Any, mode: str) -> None:
        super().__init__(own.weight, own.bias, mode, own.tp_group)
        _as_megatrons(self, own)

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return found if self.te_return_bias else (found, None)


class TEColumnParallelLinear(TELinear):
    pass


class TERowParallelLinear(TELinear):
    pass


class TELayerNormColumnParallelLinear(LayerNormLinear):
    def __init__(self, own: Any, mode: str, norm: Any) -> None:
        super().__init__(own.weight, own.bias, mode, own.tp_group)
        _as_megatrons(self, own)
        self.layer_norm_weight, self.eps = norm.weight, own.config.layernorm_epsilon

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return found if self.te_return_bias else (found, None)


_MEGATRONS = (TELinear, TEColumnParallelLinear, TERowParallelLinear, TELayerNormColumnParallelLinear)
for made in _MEGATRONS:
    made.__module__ = "megatron.core.extensions.transformer_engine"
Linear.__module__ = "transformer_engine.pytorch.module.linear"
LayerNormLinear.__module__ = "transformer_engine.pytorch.module.layernorm_linear"


def rebuild(model: Any) -> None:
    """Put the stand-ins into a model, with its own weights."""
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = TEColumnParallelLinear(attention.linear_qkv, "column")
        attention.linear_proj = TERowParallelLinear(attention.linear_proj, "row")
        mlp.linear_fc1 = TELayerNormColumnParallelLinear(mlp.linear_fc1, "column", layer.pre_mlp_layernorm)
        mlp.linear_fc2 = TERowParallelLinear(mlp.linear_fc2, "row")
        layer.pre_mlp_layernorm = torch.nn.Identity()


def duplicated(own: Any, weight: Tensor) -> TELinear:
    """Return what ``parallel_mode="duplicated"`` makes: whole on every rank, its weight marked as Megatron marks it."""
    layer = TELinear.__new__(TELinear)
    Linear.__init__(layer, weight)
    layer.config, layer._tp_group, layer.te_return_bias = own.config, own.tp_group, False
    weight.sequence_parallel = own.config.sequence_parallel  # type: ignore[attr-defined]
    return layer


class Between(nn.Module):
    """A normalisation, then a linear layer that is whole on every rank, ``linear_down``."""

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear_down = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear_down(self.norm(x))
        return y[0] if isinstance(y, tuple) else y


def with_duplicated(model: Any, *, plain: bool = False) -> None:
    """Put a layer that is whole on every rank before each MLP; ``plain``: torch's own with the same weight."""
    for layer in model.decoder.layers:
        weight = nn.Parameter(drawn(f"{layer.layer_number}.linear_down", (HIDDEN, HIDDEN)), requires_grad=False)
        linear: Any = nn.Linear(HIDDEN, HIDDEN, bias=False)
        linear.weight = weight
        linear = linear if plain else duplicated(layer.mlp.linear_fc1, weight)
        layer.pre_mlp_layernorm = Between(layer.pre_mlp_layernorm, linear)
