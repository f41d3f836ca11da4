"""``megatron.bridge.peft.lora_merge``: adding an adapter's product to a weight, both in pieces over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.errors import LayoutError


class LoRAMerge:
    """Merges the factors of an adapter into base weights, shard by shard."""

    @torch.no_grad()
    def merge(
        self,
        base_weight: Tensor,
        linear_out: Tensor,
        linear_in: Tensor,
        alpha: int,
        dim: int,
        *,
        tp_size: int,
        tp_group: Any,
    ) -> Tensor:
        """Return this rank's shard of ``W + alpha/dim · B·A``.

        A factor that lies over the ranks in rows is gathered: A of a column-parallel layer, cut over the rank, and B of
        a row-parallel one, cut over the outputs. So all ranks of the group call with the same kind of layer. Stacked
        experts have one dimension more in front, of the weight alone where they share an adapter.

        Args:
            base_weight: ``[out/tp, in]`` (column) or ``[out, in/tp]`` (row), or as much for each of ``E`` experts.
            linear_out: B, ``[out/tp, dim]``, for both kinds; or a whole ``[out, dim]`` of a row-parallel one.
            linear_in: A, ``[dim/tp, in]`` or ``[dim, in/tp]``; or a whole ``[dim, in]`` of a column-parallel one.
            alpha: the numerator of the scale.
            dim: the rank of the adapter.
            tp_size: ranks over which the adapter lies.
            tp_group: their process group; not used for one rank.

        Returns:
            A new tensor like ``base_weight``; sums are taken in the widest of the three dtypes.

        Raises:
            LayoutError: the shapes are of no such layer, or the group has another size.
        """
        if tp_size > 1 and dist.get_world_size(tp_group) != tp_size:
            raise LayoutError(f"LoRAMerge: tp_size={tp_size}, but the group has {dist.get_world_size(tp_group)} ranks")
        _check(base_weight, linear_out, linear_in, dim, tp_size)
        a = _whole(linear_in, dim, tp_size, tp_group)
        b = _whole(linear_out, base_weight.shape[-2], tp_size, tp_group)
        dtype = torch.promote_types(base_weight.dtype, torch.promote_types(a.dtype, b.dtype))
        delta = (b.to(dtype) @ a.to(dtype)) * (alpha / dim)
        return (base_weight.to(dtype) + delta).to(base_weight.dtype)


def _check(base: Tensor, b: Tensor, a: Tensor, dim: int, tp_size: int) -> None:
    rows, columns = base.shape[-2:]
    fits = a.shape[-1] == columns and a.shape[-2] in (dim, dim / tp_size)
    fits = fits and b.shape[-1] == dim and b.shape[-2] in (rows, rows / tp_size)
    fits = fits and all(factor.shape[:-2] in (base.shape[:-2], ()) for factor in (a, b))
    if not fits:
        raise LayoutError(
            f"LoRAMerge: with dim={dim} and tp_size={tp_size}, linear_in {tuple(a.shape)} and linear_out "
            f"{tuple(b.shape)} belong to no weight of {tuple(base.shape)}: linear_in is [dim or dim/tp, {columns}], "
            f"linear_out [{rows} or {rows}/tp, dim]"
        )


def _whole(factor: Tensor, rows: int, tp_size: int, group: Any) -> Tensor:
    """Return a factor with all its rows, gathered where this rank has a share of them."""
    if factor.shape[-2] == rows:
        return factor
    shares = [torch.empty_like(factor, memory_format=torch.contiguous_format) for _ in range(tp_size)]
    dist.all_gather(shares, factor.contiguous(), group=group)
    return torch.cat(shares, dim=-2)
