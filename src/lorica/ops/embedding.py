"""Embeddings: ``y = E[ids] + s·Aᵀ[ids] Bᵀ``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.ops.base import FactorShapes, Host, Op, add_product, carried


class Embedding(Op):
    """``nn.Embedding`` of ``V`` rows of width ``d``; A is ``[r, V]``, B is ``[d, r]``.

    Dropout "pre" would drop whole tokens from a lookup and is not applied, as in PEFT; "post" is. A maximal norm of
    the base rows (``max_norm``) is not forced on A: a forward never writes to a factor.
    """

    kind = "Embedding"
    lookup = True
    tokenwise = True
    roles_weight = ("in", "out")
    roles_magnitude = ("out",)

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, V]``, B ``[d, r]``."""
        rows, width = self.logical_shape(base)
        return FactorShapes(torch.Size((r, rows)), torch.Size((width, r)))

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:
        """An embedding has no bias that B's could be merged into."""
        if spec.bias:
            raise TargetError(f"{where}: lora_bias=True is not supported for embeddings, which have no bias")

    def add(self, y: Tensor, x: Tensor, layer: Host, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Look up rows of Aᵀ, then add their product with Bᵀ. Where the vocabulary is cut, ids off this rank give 0."""
        base = layer.base_layer
        h = _look_up(x, layer, factors.a.T)
        if (embed_scale := getattr(base, "embed_scale", None)) is not None:
            h = h * embed_scale  # the base layer multiplies its rows too (Gemma, BART)
        h_TR = carried(h.to(y.dtype).reshape(-1, h.shape[-1]), x.shape, layer)
        return add_product(y, h_TR, layer, factors, spec)

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``Aᵀ, Bᵀ``."""
        return factors.a.T, factors.b.T


def _look_up(ids: Tensor, layer: Host, rows_VR: Tensor) -> Tensor:
    base, site = layer.base_layer, layer.site
    options = {name: getattr(base, name, False) for name in ("scale_grad_by_freq", "sparse")}
    padding_idx: int | None = getattr(base, "padding_idx", None)
    if site is None or site.layout.cut_of("in") is None:
        return F.embedding(ids, rows_VR, padding_idx, **options)
    if not len(rows_VR):  # more ranks than the vocabulary has shares
        return rows_VR.new_zeros(*ids.shape, rows_VR.shape[1]) + rows_VR.sum()
    place, found = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    padding, first = None, 0
    for start, stop in site.layout.held("in", site.layout.sizes["in"], site.at):
        here = (ids >= start) & (ids < stop)
        place = torch.where(here, ids - (start - first), place)
        found = found | here
        if padding_idx is not None and start <= padding_idx < stop:
            padding = padding_idx - start + first
        first += stop - start
    return F.embedding(place, rows_VR, padding, **options) * found.unsqueeze(-1)
