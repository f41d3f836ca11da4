"""QA-LoRA: features share a column of A in groups, so that a delta fits a weight that is quantised in groups
(https://arxiv.org/abs/2309.14717).

::

    y = x Wᵀ + s·(p(x) Aᵀ) Bᵀ        p(x) = (mean of each group of features) · (number of groups),  A [r, in/g]
"""

from __future__ import annotations

from typing import Any

import torch

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.layout import Roles
from lorica.ops import FactorShapes, Op
from lorica.variants.base import Hosting, Variant, cut_along


class QaLora(Variant):
    """A has one column for every group of ``g`` input features (of a convolution: of input channels).

    Every rank has all of A, which is ``g`` times smaller than LoRA's, also where the layer is cut by its inputs: groups
    may then lie across ranks. The delta is plain LoRA's with each column of A repeated.
    """

    def options(self, config: Any, field: str, key: str) -> int:
        """The size of a group."""
        return int(config.qalora_group_size)

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """The input must have features."""
        if op.lookup:
            raise TargetError(f"{where}: use_qalora=True is not supported for embeddings, whose input has no features")

    def roles(self, op: Op, spec: AdapterSpec) -> tuple[Roles, Roles]:
        """The groups lie whole on every rank."""
        return tuple("group" if role == "in" else role for role in op.roles_a), op.roles_b

    def shapes(self, shapes: FactorShapes, op: Op, spec: AdapterSpec, where: str = "") -> FactorShapes:
        """A ``[r, in/g]``."""
        dim, group = op.roles_a.index("in"), spec.options
        size = shapes.a[dim]
        if size % group:
            raise TargetError(
                f"{where}: `use_qalora=True` requires `module.in_features` ({size}) to be divisible by "
                f"'qalora_group_size' ({group})"
            )
        return shapes._replace(a=torch.Size((*shapes.a[:dim], size // group, *shapes.a[dim + 1 :])))

    def plain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Factors:
        """A with every column repeated, for the features that this rank has."""
        dim, group, a = layer.op.roles_a.index("in"), spec.options, factors.a
        repeated = a.unsqueeze(dim + 1).expand(*a.shape[: dim + 1], group, *a.shape[dim + 1 :]).flatten(dim, dim + 1)
        scale = a.shape[dim] / group
        return Factors(cut_along(layer, repeated, dim, "in") * scale, factors.b, factors.bias)
