"""``nn.MultiheadAttention``: its projections are bare weights, so the deltas go into weights for one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.ops.base import FactorShapes, Host, Op, Running, autocast_off


class Attention(Op):
    """The fused q, k, v projection of ``nn.MultiheadAttention``; the output projection is adapted along with it.

    The module computes from its weights directly and never calls ``out_proj``. So a forward builds ``W + s·B·A`` of
    both projections, differentiably, and hands them to the base module for that call. Nothing is written to the base.
    """

    kind = "MultiheadAttention"
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"
    children = ("out_proj",)

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, d]``, B ``[3·d, r]``."""
        rows, width = self.logical_weight(base).shape
        return FactorShapes(torch.Size((r, width)), torch.Size((rows, r)))

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:
        """Only the fused projection can be adapted, and nothing can be dropped on the way into a weight."""
        if not base._qkv_same_embed_dim:
            raise TargetError(
                f"{where}: only nn.MultiheadAttention with the same width for query, key and value is supported "
                f"(embed_dim {base.embed_dim}, kdim {base.kdim}, vdim {base.vdim})"
            )

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``B, A``."""
        return factors.b, factors.a

    def add(self, y: Tensor, x: Tensor, layer: Host, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Not used: the delta goes into the weights, see :meth:`forward`."""
        raise AssertionError("attention has no output to add to")

    def forward(self, layer: Host, base: Callable[..., Any], running: Running, *args: Any, **kwargs: Any) -> Any:
        """Call the base module with the deltas in its weights."""
        module = layer.base_layer
        projection = module.out_proj
        with autocast_off(module.in_proj_weight.device.type):
            weights = _adapted(layer, self, module, running, "")
            inner = projection.running()
            weights |= _adapted(projection, projection.op, projection.base_layer, inner, "out_proj.base_layer.")
        return functional_call(module, weights, args, kwargs)


def _adapted(layer: Host, op: Op, base: Any, running: Running, prefix: str) -> dict[str, Tensor]:
    weight, bias = getattr(base, op.weight_name), getattr(base, op.bias_name)
    for factors, spec in running:
        left, right = op.delta(base, layer.in_forward(factors, spec))
        weight = torch.addmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=spec.scaling)
        if factors.bias is not None:
            bias = torch.add(bias, factors.bias.to(bias.dtype), alpha=spec.scaling)
    adapted = {f"{prefix}{op.weight_name}": weight}
    return adapted if bias is None else adapted | {f"{prefix}{op.bias_name}": bias}
