"""KaSA: learned singular values between the factors, on a base weight without its smallest ones
(https://arxiv.org/abs/2412.06071).

::

    y = x W'ᵀ + s·((x Aᵀ)·d) Bᵀ        W' = W without its r smallest singular values, for good
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors, InitRequest
from lorica.init.mica import minor_directions
from lorica.ops import Op
from lorica.variants.base import Extra, Hosting, Variant, drawn

#: Name of the singular values in a file, below the layer.
DIAGONAL = "lora_diag"


class Kasa(Variant):
    """One singular value for every row of A.

    What is taken out of the base weight does not come back when the adapter is turned off or deleted, or is merged and
    unmerged (PEFT's meaning). It is worked out on the logical weight, which is gathered for it where it is cut.
    """

    subtracts = True

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """A grouped convolution has no matrix of its own."""
        if getattr(base, "groups", 1) > 1:
            raise TargetError(f"{where}: kasa_config is not supported for convolutions with groups > 1")

    def extras(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> list[Extra]:
        """The singular values: ``[r]``, of stacked experts ``[E, r]``."""
        sides = [(role, n) for role, n in zip(layer.op.roles_a, factors.a.shape, strict=True) if role in _KEPT]
        roles, shape = zip(*sides, strict=True)
        return [Extra(DIAGONAL, DIAGONAL, "", roles, factors.a.new_empty(shape, device="meta").shape)]

    def start(self, layer: Hosting, factors: Factors, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
        """Standard normal; the delta is zero all the same, since B is."""
        (extra,) = self.extras(layer, factors, spec)
        return {DIAGONAL: drawn(layer, extra, seed, lambda tensor, generator: tensor.normal_(generator=generator))}

    def plain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Factors:
        """``B·diag(d)``, or ``diag(d)·A`` where B's columns stand for several projections."""
        values = factors.extras[DIAGONAL].to(factors.a.dtype)
        if layer.op.lookup:
            return Factors(factors.a, factors.b * values, factors.bias)
        behind = factors.a.dim() - values.dim()
        return Factors(factors.a * values.view(*values.shape, *[1] * behind), factors.b, factors.bias)

    def taken(self, request: InitRequest) -> Factors:
        """The part of the weight along its ``r`` smallest singular values."""
        u_OR, s_R, v_RI = minor_directions(request, least=1)
        return Factors(v_RI.reshape(request.shape_a), (u_OR * s_R).reshape(request.shape_b))


_KEPT = ("expert", "rank")
