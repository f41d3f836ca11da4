"""Linear layers: ``y = x Wᵀ + s·(x Aᵀ) Bᵀ``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.layout import Roles
from lorica.ops.base import FactorShapes, Host, Op, add_product, carried
from lorica.ops.dropout import drop

#: A way of multiplying ``[T, in]`` with the transposed of ``[r, in]``.
Product = Callable[[Tensor, Tensor], Tensor]


class Linear(Op):
    """``nn.Linear`` and what behaves like it; the weight is ``[out, in]``.

    Args:
        weight_name: the parameter of the base layer that is the weight.
    """

    kind = "Linear"
    tokenwise = True
    roles_magnitude: Roles | None = ("out",)

    def __init__(self, weight_name: str = "weight") -> None:
        self.weight_name = weight_name

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, in]``, B ``[out, r]``."""
        out_features, in_features = self.logical_shape(base)
        return FactorShapes(torch.Size((r, in_features)), torch.Size((out_features, r)))

    def add(
        self, y: Tensor, x: Tensor, layer: Host, factors: Factors, spec: AdapterSpec, product: Product = F.linear
    ) -> Tensor:
        """Add ``s·(x Aᵀ) Bᵀ`` in one ``addmm``; the factors follow the dtype of ``y``, so ``x`` is never widened.

        ``product`` makes ``x Aᵀ`` of ``[T, in]`` and ``[r, in]``.
        """
        a_RI = factors.a.to(y.dtype)
        x_TI = drop(x.to(y.dtype), spec, "pre", layer.site, layer.training).reshape(-1, a_RI.shape[1])
        return add_product(y, carried(product(x_TI, a_RI), x.shape[:-1], layer), layer, factors, spec)

    def matrices(self, layer: Host, factors: Factors) -> tuple[Tensor, Tensor]:
        """A and B."""
        return factors.a, factors.b

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``B, A``."""
        return factors.b, factors.a


class TransposedLinear(Linear):
    """transformers' ``Conv1D``: a linear whose weight is stored ``[in, out]`` (``fan_in_fan_out``)."""

    transposed = True
    roles_weight = ("in", "out")

    def orient(self, weight: Tensor) -> Tensor:
        """``[out, in]``, a view."""
        return weight.T

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``Aᵀ, Bᵀ``."""
        return factors.a.T, factors.b.T


class Router(Linear):
    """What gives each token its logits for the experts of a mixture; no linear layer in the sense of "all-linear"."""

    kind = "Router"


class Beside(Linear):
    """A linear inside a larger step, which the adapter stands beside: TransformerEngine's ``LayerNormLinear``.

    A sees what goes into the step, before its normalisation (PEFT's meaning of such adapters), so that ``B·A`` has no
    place in the weight.
    """

    roles_magnitude = None

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """Refused."""
        raise TargetError(
            f"the delta of a {type(base).__name__} has no place in its weight: A sees the input before it is normalised"
        )
