"""Convolutions: A is a convolution like the base layer's onto r channels, B a pointwise one back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.ops.base import FactorShapes, Host, Op, need_rank_divisible, share_of_bias
from lorica.ops.dropout import drop

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Conv(Op):
    """``nn.Conv1d/2d/3d``; A is ``[r, in, *k]``, B is ``[out, r/groups, 1 …]``.

    A has the base layer's stride, padding, padding mode and dilation. With groups, A sees all input channels and only
    B is grouped (PEFT's shapes), so such a delta has no place in the base weight.
    """

    def __init__(self, dimensions: int) -> None:
        self.kind = f"Conv{dimensions}d"  # type: ignore[misc]
        kernel = ("kernel",) * dimensions
        self.roles_weight = ("out", "in", *kernel)
        self.roles_a = ("rank", "in", *kernel)
        self.roles_b = ("out", "rank", *kernel)
        self.roles_magnitude = ("one", "out", *kernel)

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, in, *k]``, B ``[out, r/groups, 1 …]``."""
        kernel = base.kernel_size
        a = torch.Size((r, base.in_channels, *kernel))
        return FactorShapes(a, torch.Size((base.out_channels, r // base.groups, *[1] * len(kernel))))

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:
        """The groups must divide the rank."""
        need_rank_divisible(spec.r, base.groups, where)

    def add(self, y: Tensor, x: Tensor, layer: Host, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Convolve with A as the base layer does, then pointwise with ``s·B``."""
        base = layer.base_layer
        convolve = _CONVOLVE[factors.a.dim()]
        x = drop(x.to(y.dtype), spec, "pre", layer.site, layer.training)
        x, padding = _pad(x, base)
        h = convolve(x, factors.a.to(y.dtype), None, base.stride, padding, base.dilation)
        bias = share_of_bias(layer, factors, y.dtype)
        bias = None if bias is None else bias * spec.scaling
        part = convolve(h, factors.b.to(y.dtype) * spec.scaling, bias, groups=base.groups)
        return y + drop(part, spec, "post", layer.site, layer.training)

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``B, A`` with the kernel flattened into A's columns."""
        if base.groups > 1:
            raise TargetError(
                f"Merging is not supported for convolutions with groups > 1 (here {base.groups}): the delta connects "
                "every input channel to every output channel, which the grouped weight cannot hold"
            )
        return factors.b.flatten(1), factors.a.flatten(1)


def _pad(x: Tensor, base: Any) -> tuple[Tensor, Any]:
    if base.padding_mode == "zeros":
        return x, base.padding
    return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
