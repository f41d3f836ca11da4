"""Query, key and value projections of grouped-query attention, also on more ranks than there are key/value heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lorica.engines.native.base import AxisLike, axis_of
from lorica.engines.native.collectives import enter, sequence_gather
from lorica.engines.native.layers import ColumnParallelLinear
from lorica.errors import LayoutError
from lorica.layout import HeadOrder, grouped_heads

NAMES = ("q_proj", "k_proj", "v_proj")


class GQAQKVColumnParallelLinear(nn.Module):
    """q, k and v of one attention block behind one collective at their input.

    The layers that hold the weights are ``ColumnParallelLinear``: ``qkv_proj`` with the parts ``q_proj``, ``k_proj``
    and ``v_proj`` where they are fused, else three of those names. An adapter is put on them.

    Args:
        input_size: logical size of the input.
        output_sizes: logical sizes of the query and of the key (or value) projection.
        bias: whether there are biases.
        axis: over which to cut.
        head_dim: rows of one head.
        gather_output: whether every rank gets q, k and v whole; needs as many key/value heads as ranks, or more.
        fuse_qkv: whether the three are one weight.
        kv_size_multiplier: ranks that hold each key/value head; None: as few as the axis needs.
        order: which copies lie where, see :func:`lorica.layout.grouped_heads`.
        sequence_parallel_enabled: whether the input holds this rank's tokens only.
        sequence_dimension: the dimension of the tokens.
        device: of the parameters.
        dtype: of the parameters.

    With copies, the gradient of a *trained* key or value weight is partial over the axis: each copy has that of its
    own queries (``layout.summed`` of its layer). Nothing of weight size is ever sent for frozen ones, and the
    input's gradient is right as it is, since it is summed over the axis.

    Attributes:
        heads: the query and key/value heads of every rank; the output projection's input columns lie likewise.

    Raises:
        LayoutError: the heads cannot be divided so.
    """

    heads: HeadOrder

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        axis: AxisLike,
        head_dim: int,
        gather_output: bool = False,
        fuse_qkv: bool = True,
        kv_size_multiplier: int | None = None,
        order: Literal["strided", "neighbours"] = "strided",
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int = -2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        query, kv = output_sizes
        if query % head_dim or kv % head_dim:
            raise LayoutError(f"projections of {query} and {kv} rows do not consist of heads of {head_dim}")
        self.axis = axis_of(axis)
        self.heads = grouped_heads(
            self.axis.size, query // head_dim, kv // head_dim, multiplier=kv_size_multiplier, order=order
        )
        self.gather_output = gather_output
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.sequence_dimension = sequence_dimension
        self.rows = tuple(head_dim * len(heads[self.axis.rank]) for heads in (self.heads.query, *2 * (self.heads.kv,)))
        name, sizes = self.axis.name, (query, kv, kv)
        options: dict[str, Any] = {"axis": self.axis, "disable_grad_reduce": True, "device": device, "dtype": dtype}
        cuts = (self.heads.query_cut(name, head_dim), *2 * (self.heads.kv_cut(name, head_dim),))
        if fuse_qkv:
            if gather_output:
                raise LayoutError("gather_output: q, k and v are gathered one by one; take fuse_qkv=False")
            cut, parts = self.heads.qkv_cut(name, head_dim), tuple(zip(NAMES, sizes, strict=True))
            self.qkv_proj = ColumnParallelLinear(
                input_size, sum(sizes), bias, cut=cut, parts=parts, gather_output=False, **options
            )
        else:
            for part, size, cut in zip(NAMES, sizes, cuts, strict=True):
                layer = ColumnParallelLinear(input_size, size, bias, cut=cut, gather_output=gather_output, **options)
                self.add_module(part, layer)

    @classmethod
    def from_linears(cls, q: nn.Linear, k: nn.Linear, v: nn.Linear, axis: AxisLike, **options: Any) -> Self:
        """Return this rank's piece of three whole projections; for the options see the constructor.

        Raises:
            LayoutError: they do not fit together, or the heads cannot be divided.
        """
        if k.weight.shape != v.weight.shape or len({linear.bias is None for linear in (q, k, v)}) > 1:
            raise LayoutError("keys and values differ in shape, or some of q, k and v have a bias and some have none")
        sizes = (q.out_features, k.out_features)
        layer = cls(q.in_features, sizes, q.bias is not None, axis=axis, dtype=q.weight.dtype, device="meta", **options)
        if not options.get("fuse_qkv", True):
            for name, linear in zip(NAMES, (q, k, v), strict=True):
                layer.get_submodule(name).adopt(linear)  # type: ignore[operator]
            return layer
        whole = nn.Linear(q.in_features, sum((*sizes, sizes[1])), q.bias is not None, "meta", q.weight.dtype)
        for name in ("weight", "bias")[: 1 + (q.bias is not None)]:
            rows = torch.cat([getattr(linear, name).detach() for linear in (q, k, v)])
            setattr(whole, name, nn.Parameter(rows, requires_grad=getattr(q, name).requires_grad))
        layer.qkv_proj.adopt(whole)
        return layer

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v: this rank's heads, or all."""
        if self.sequence_parallel_enabled:
            input = sequence_gather(input, self.axis, self.sequence_dimension)
        else:
            input = enter(input, self.axis)
        if "qkv_proj" in self._modules:
            q, k, v = torch.split(self.qkv_proj(input), list(self.rows), dim=-1)
        else:
            q, k, v = (self.get_submodule(name)(input) for name in NAMES)
        return q, k, v


__all__ = ["GQAQKVColumnParallelLinear"]
