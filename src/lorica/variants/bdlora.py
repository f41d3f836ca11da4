"""BD-LoRA: one of the factors is block-diagonal, so that servers which cut a model need not send what the adapter
computes (https://arxiv.org/abs/2510.23346).

::

    A of a row layer                     B of a column layer
    [A₁        ]  kept as [r, in/n]      [B₁        ]  kept as [out, r/n]
    [    A₂    ]                         [    B₂    ]
    [        A₃]                         [        B₃]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorica.config.options import BdLoraConfig
from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.layout import Roles
from lorica.ops import FactorShapes, Op
from lorica.variants.base import Hosting, Variant, cut_along


@dataclass(frozen=True)
class Blocks:
    """What one target has.

    Attributes:
        factor: which factor is block-diagonal; empty: none, the target has plain LoRA.
        count: of blocks.
    """

    factor: Literal["a", "b", ""]
    count: int


class BdLora(Variant):
    """A block-diagonal factor is kept without its zeros, in PEFT's shapes.

    Blocks need not agree with the way a layer is cut. The rows of B lie as the layer's do. Of A, which is ``n`` times
    smaller than LoRA's, every rank has all.
    """

    def options(self, config: Any, field: str, key: str) -> Blocks:
        """Find the target in one of the lists, of parts of names.

        Raises:
            TargetError: it is in both, or in neither and ``match_strict`` is set.
        """
        options: BdLoraConfig = getattr(config, field)
        in_a, in_b = (
            any(part in key for part in parts or ())
            for parts in (options.target_modules_bd_a, options.target_modules_bd_b)
        )
        if in_a and in_b:
            raise TargetError(f"Target {key} matches both A and B block-diagonal patterns")
        if options.match_strict and not (in_a or in_b):
            raise TargetError(
                f"Target {key} matches neither A nor B block-diagonal patterns. If this is intentional, set "
                "match_strict=False in BdLoraConfig during initialization."
            )
        return Blocks("a" if in_a else "b" if in_b else "", options.nblocks)

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """The blocks must divide the rows of every projection, and an input must have features."""
        if spec.options.factor == "a" and op.lookup:
            raise TargetError(f"{where}: target_modules_bd_a is not supported for embeddings, whose input is no vector")
        if getattr(base, "groups", 1) > 1:
            raise TargetError(f"{where}: use_bdlora is not supported for convolutions with groups > 1")
        for name, first, last in op.parts(base) if spec.options.factor == "b" else ():
            _divided(last - first, spec.options.count, f"{where} ({name})", "out_features")

    def roles(self, op: Op, spec: AdapterSpec) -> tuple[Roles, Roles]:
        """What is left of the dimension whose zeros are not kept lies whole on every rank."""
        gone_a, gone_b = ("in" if spec.options.factor == "a" else ""), ("rank" if spec.options.factor == "b" else "")
        return (
            tuple("block" if role == gone_a else role for role in op.roles_a),
            tuple("block" if role == gone_b else role for role in op.roles_b),
        )

    def shapes(self, shapes: FactorShapes, op: Op, spec: AdapterSpec, where: str = "") -> FactorShapes:
        """A ``[r, in/n]`` or B ``[out, r/n]``."""
        blocks: Blocks = spec.options
        if blocks.factor:
            _divided(spec.r, blocks.count, where, "r")
        if blocks.factor == "a":
            return shapes._replace(a=_narrowed(shapes.a, op.roles_a.index("in"), blocks, where, "in_features"))
        if blocks.factor == "b":
            _divided(shapes.b[op.roles_b.index("out")], blocks.count, where, "out_features")
            return shapes._replace(b=_narrowed(shapes.b, op.roles_b.index("rank"), blocks, where, "r"))
        return shapes

    def plain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Factors:
        """The factors with their zeros."""
        op, blocks = layer.op, spec.options
        if blocks.factor == "a":
            rank, width = op.roles_a.index("rank"), op.roles_a.index("in")
            rows = _block_of(factors.a, factors.a.shape[rank], spec.r, blocks)  # of each projection anew
            whole = _spread(factors.a, rank, width, rows, blocks)
            return Factors(cut_along(layer, whole, width, "in"), factors.b, factors.bias)
        if blocks.factor == "b":
            out, rank = op.roles_b.index("out"), op.roles_b.index("rank")
            whole = _spread(factors.b, out, rank, _row_blocks(layer, factors.b, blocks), blocks)
            return Factors(factors.a, whole, factors.bias)
        return factors


def _row_blocks(layer: Hosting, b: Tensor, blocks: Blocks) -> Tensor:
    """Return in which block each of this rank's rows of B is."""
    out = layer.op.roles_b.index("out")
    size = b.shape[out] if layer.site is None else layer.site.layout.sizes["out"]
    lengths = [last - first for _, first, last in layer.op.parts(layer.base_layer)] or [size]
    whole = torch.cat([_block_of(b, length, length, blocks) for length in lengths])
    return cut_along(layer, whole, 0, "out")


def _block_of(like: Tensor, count: int, length: int, blocks: Blocks) -> Tensor:
    """Return the block of each of ``count`` rows or columns that come in runs of ``length``, divided into blocks."""
    return torch.arange(count, device=like.device) % length // (length // blocks.count)


def _spread(kept: Tensor, rows: int, columns: int, block_of_row: Tensor, blocks: Blocks) -> Tensor:
    """Return a factor with its zeros: what is kept stands in the columns of its row's block."""
    times = [blocks.count if dim == columns else 1 for dim in range(kept.dim())]
    whole = kept.repeat(times)
    block_of_column = _block_of(kept, whole.shape[columns], whole.shape[columns], blocks)
    here = block_of_row.unsqueeze(1) == block_of_column
    shape = [whole.shape[dim] if dim in (rows, columns) else 1 for dim in range(kept.dim())]
    return torch.where(here.view(shape), whole, 0)


def _narrowed(shape: torch.Size, dim: int, blocks: Blocks, where: str, what: str) -> torch.Size:
    _divided(shape[dim], blocks.count, where, what)
    return torch.Size((*shape[:dim], shape[dim] // blocks.count, *shape[dim + 1 :]))


def _divided(length: int, count: int, where: str, what: str) -> None:
    if length % count:
        raise TargetError(
            f"{where}: use_bdlora with nblocks={count} needs {what}={length} to be divisible by it; choose another "
            "number of blocks or leave the layer out"
        )
