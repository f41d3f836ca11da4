"""Embeddings: ``y = E[ids] + s·Aᵀ[ids] Bᵀ``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.ops.base import FactorShapes, Op, add_product


class Embedding(Op):
    """``nn.Embedding`` of ``V`` rows of width ``d``; A is ``[r, V]``, B is ``[d, r]``.

    Dropout "pre" would drop whole tokens from a lookup and is not applied, as in PEFT; "post" is. A maximal norm of
    the base rows (``max_norm``) is not forced on A: a forward never writes to a factor.
    """

    kind = "Embedding"
    lookup = True

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, V]``, B ``[d, r]``."""
        rows, width = self.logical_weight(base).shape
        return FactorShapes(torch.Size((r, rows)), torch.Size((width, r)))

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:
        """An embedding has no bias that B's could be merged into."""
        if spec.bias:
            raise TargetError(f"{where}: lora_bias=True is not supported for embeddings, which have no bias")

    def add(self, y: Tensor, x: Tensor, base: Any, factors: Factors, spec: AdapterSpec, training: bool) -> Tensor:
        """Look up rows of Aᵀ, then add their product with Bᵀ."""
        h = F.embedding(
            x, factors.a.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
        )
        if (embed_scale := getattr(base, "embed_scale", None)) is not None:
            h = h * embed_scale  # the base layer multiplies its rows too (Gemma, BART)
        return add_product(y, h.to(y.dtype).reshape(-1, h.shape[-1]), factors, spec, training)

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``Aᵀ, Bᵀ``."""
        return factors.a.T, factors.b.T
