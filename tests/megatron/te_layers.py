"""Stand-ins for Megatron's linears over Transformer Engine, which needs a GPU: what lorica asks of them, in torch.

They have the names, the attributes and the collectives of ``TEColumnParallelLinear``, ``TERowParallelLinear`` and
``TELayerNormColumnParallelLinear``: collectives inside ``forward``, and none where the layer is alone
(``parallel_mode=None``, ``tp_size=1``). :func:`rebuild` puts them into a tiny GPT in the place of its own layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TELinear(nn.Module):
    """A linear layer made of one of Megatron-Core's own."""

    def __init__(self, own: Any, mode: str) -> None:
        super().__init__()
        self.config, self._tp_group, self.tp_size = own.config, own.tp_group, own.tp_group.size()
        self.parallel_mode: str | None = mode
        self.sequence_parallel = own.config.sequence_parallel and self.tp_size > 1
        self.weight, self.use_bias, self.te_return_bias = own.weight, own.bias is not None, False
        self.out_features, self.in_features = own.weight.shape

    def forward(self, x: Tensor) -> Any:
        return self._linear(x), None

    def _linear(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        group, alone = self._tp_group, self.tp_size == 1
        if self.parallel_mode == "column" and not alone:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        y = F.linear(x, self.weight)
        if self.parallel_mode == "row" and not alone:
            if self.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
            return mappings.reduce_from_tensor_model_parallel_region(y, group=group)
        return y


class TEColumnParallelLinear(TELinear):
    pass


class TERowParallelLinear(TELinear):
    pass


class TELayerNormColumnParallelLinear(TELinear):
    """A normalisation and a linear layer in one."""

    def __init__(self, own: Any, mode: str, norm: Any) -> None:
        super().__init__(own, mode)
        self.layer_norm_weight, self.eps, self.return_layernorm_output = (
            norm.weight,
            own.config.layernorm_epsilon,
            False,
        )

    def forward(self, x: Tensor) -> Any:
        normed = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        y = self._linear(normed)
        return ((y, normed) if self.return_layernorm_output else y), None


for made in (TEColumnParallelLinear, TERowParallelLinear, TELayerNormColumnParallelLinear):
    made.__module__ = "megatron.core.extensions.transformer_engine"


def rebuild(model: Any) -> None:
    """Put the stand-ins into a model, with its own weights."""
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = TEColumnParallelLinear(attention.linear_qkv, "column")
        attention.linear_proj = TERowParallelLinear(attention.linear_proj, "row")
        mlp.linear_fc1 = TELayerNormColumnParallelLinear(mlp.linear_fc1, "column", layer.pre_mlp_layernorm)
        mlp.linear_fc2 = TERowParallelLinear(mlp.linear_fc2, "row")
        layer.pre_mlp_layernorm = torch.nn.Identity()
