"""The communication of Megatron Bridge's LoRA, written anew for comparison. This is not Megatron's code.

It follows Bridge's public description: both factors are cut. A column-parallel layer has A ``[r/t, in]`` and B
``[out/t, r]``, a row-parallel one A ``[r, in/t]`` and B ``[out/t, r]``, and the adapter is a pair of parallel linears
of its own beside the base layer. Its collectives (B, S, r: batch, tokens, rank):

=====================  ==========================================  ====================================
layer                  forward                                     backward
=====================  ==========================================  ====================================
column                 all-gather h                                all-reduce dh, all-reduce dx
column, SP             all-gather x, all-gather h                  all-reduce dh, reduce-scatter dx
row                    all-reduce h, all-gather y                  all-reduce dh
row, SP                all-reduce h, all-gather y, slice           all-gather dy, all-reduce dh
row, SP, all-to-all    all-reduce h, all-to-all y                  all-to-all dy, all-reduce dh
=====================  ==========================================  ====================================

Gradients of both factors are whole on their rank, so nothing is sent for them. Parallel linears of megatron-core
0.16.1, put together in this way, send the same collectives and bytes (and one all-reduce of dx more in the second row,
whose linears do not know of the gather before them).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engines.native import ColumnParallelLinear, RowParallelLinear
from lorica.engines.native.collectives import enter, gather, leave, sequence_gather, shares, split
from lorica.engines.site import Axis

TOKENS = 1


class MegatronLora(nn.Module):
    """A native parallel layer with a pair of parallel linears beside it.

    Args:
        base: the frozen layer.
        a_RI: the logical A, ``[r, in]``; the axis divides the rank.
        b_OR: the logical B, ``[out, r]``.
        scale: of the delta.
        a2a: whether a row-parallel layer under sequence parallelism exchanges outputs by an all-to-all.
    """

    def __init__(
        self,
        base: ColumnParallelLinear | RowParallelLinear,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        *,
        a2a: bool = False,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.a2a = base, scale, a2a
        self.axis: Axis = base.axis
        layout, at = base.layout, base.at
        if isinstance(base, ColumnParallelLinear):
            a, b = a_RI.chunk(self.axis.size)[self.axis.rank], layout.take(b_OR, ("out", "rank"), at)
        else:
            a, b = layout.take(a_RI, ("rank", "in"), at), b_OR.chunk(self.axis.size)[self.axis.rank]
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus the adapter's."""
        column = isinstance(self.base, ColumnParallelLinear)
        return torch.add(self.base(x), self.column(x) if column else self.row(x), alpha=self.scale)

    def column(self, x: Tensor) -> Tensor:
        """The adapter of a column-parallel layer: a column-parallel linear with a gathered output, then another."""
        parallel = self.base.sequence_parallel_enabled
        lengths = [x.shape[TOKENS]] * self.axis.size  # the ranks have equally many tokens here
        x = sequence_gather(x, self.axis, TOKENS, lengths) if parallel else enter(x, self.axis)
        h = gather(F.linear(x, self.a), self.axis, -1, [len(self.a)] * self.axis.size)
        return F.linear(enter(h, self.axis), self.b)

    def row(self, x: Tensor) -> Tensor:
        """The adapter of a row-parallel layer: a row-parallel linear, then a column-parallel one."""
        h = leave(F.linear(x, self.a), self.axis)
        y = F.linear(enter(h, self.axis), self.b)
        if self.base.sequence_parallel_enabled and self.a2a:
            result: Tensor = _Exchange.apply(y, self.axis)
            return result
        y = gather(y, self.axis, -1, [len(self.b)] * self.axis.size)
        return split(y, self.axis, TOKENS) if self.base.sequence_parallel_enabled else y


class _Exchange(torch.autograd.Function):
    """All tokens of this rank's features ↔ this rank's tokens of all features."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _swap(y, axis, TOKENS, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _swap(gradient, ctx.axis, -1, TOKENS), None


def _swap(x: Tensor, axis: Axis, divided: int, joined: int) -> Tensor:
    assert len(set(shares(x.shape[divided], axis.size))) == 1, "equal shares only"
    first = torch.stack(x.chunk(axis.size, divided)).contiguous()
    every = torch.empty_like(first)
    dist.all_to_all_single(every, first, group=axis.group)
    return torch.cat(every.unbind(0), joined)


__all__ = ["MegatronLora"]
