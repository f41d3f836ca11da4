"""``nn.MultiheadAttention``: its projections are bare weights, so the deltas go into weights for one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lorica.config.spec import AdapterSpec
from lorica.errors import AdapterError, TargetError
from lorica.init import Factors
from lorica.ops.base import FactorShapes, Host, Op, Running, autocast_off


class Attention(Op):
    """The fused q, k, v projection of ``nn.MultiheadAttention``; the output projection is adapted along with it.

    The module computes from its weights directly and never calls ``out_proj``. So a forward builds ``W + s·B·A`` of
    both projections, differentiably, and hands them to the base module for that call. Nothing is written to the base.
    """

    kind = "MultiheadAttention"
    inward = True
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"
    children = ("out_proj",)

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, d]``, B ``[3·d, r]``."""
        rows, width = self.logical_shape(base)
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

    def by_rows(
        self, layer: Host, args: tuple[Any, ...], kwargs: dict[str, Any], *, back: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Query, key and value have their rows first or second; a mask may have them before its heads, in one."""
        module = layer.base_layer
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if given["query"].dim() != 3:
            raise AdapterError(
                f"{layer.target_name}: adapter_names needs a batch, got a query {tuple(given['query'].shape)}"
            )
        if not module.batch_first:
            # One tensor three times stays one: the module takes a faster way then.
            turned = {id(given[name]): given[name].transpose(0, 1) for name in _ARGUMENTS[:3]}
            given |= {name: turned[id(given[name])] for name in _ARGUMENTS[:3]}
        if (mask := given.get("attn_mask")) is not None:
            given["attn_mask"] = mask.flatten(0, 1) if back else _mask_by_rows(mask, len(given["query"]), module)
        return (), given

    def output_by_rows(self, layer: Host, output: Any) -> Any:
        """The attended values have their rows first or second, the weights always first."""
        values, weights = output
        return (values if layer.base_layer.batch_first else values.transpose(0, 1)), weights

    def forward(self, layer: Host, base: Callable[..., Any], running: Running, *args: Any, **kwargs: Any) -> Any:
        """Call the base module with the deltas in its weights."""
        module = layer.base_layer
        projection = module.out_proj
        with autocast_off(module.in_proj_weight.device.type):
            weights = _adapted(layer, self, module, running, "")
            inner = projection.running()
            weights |= _adapted(projection, projection.op, projection.base_layer, inner, "out_proj.base_layer.")
        return functional_call(module, weights, args, kwargs)


#: The parameters of the module's forward, in their order.
_ARGUMENTS = (
    *("query", "key", "value", "key_padding_mask"),
    *("need_weights", "attn_mask", "average_attn_weights", "is_causal"),
)


def _mask_by_rows(mask: Tensor, rows: int, module: Any) -> Tensor:
    """Return a mask ``[rows, heads, to, from]``."""
    if mask.dim() == 2:
        return mask.expand(rows, module.num_heads, -1, -1)
    return mask.reshape(rows, module.num_heads, *mask.shape[1:])


def _adapted(layer: Host, op: Op, base: Any, running: Running, prefix: str) -> dict[str, Tensor]:
    weight, bias = getattr(base, op.weight_name), getattr(base, op.bias_name)
    for factors, spec in running:
        left, right = op.delta(base, layer.in_forward(factors, spec))
        weight = torch.addmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=spec.scaling)
        if factors.bias is not None:
            bias = torch.add(bias, factors.bias.to(bias.dtype), alpha=spec.scaling)
    adapted = {f"{prefix}{op.weight_name}": weight}
    return adapted if bias is None else adapted | {f"{prefix}{op.bias_name}": bias}
