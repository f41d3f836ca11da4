"""What stands for Transformer Engine's layers in tests: its package needs a GPU, and is known by names alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """The layer of many weights that ``TEGroupedMLP`` asks for, ``weight0`` … ``[out, in]`` of this rank.

    Called as the real one: tokens of all experts and how many each has, giving outputs and a bias, here none.
    """

    #: The dimension of a weight that the expert-tensor-parallel ranks divide.
    divided = 0

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str,
        pg_collection: Any,
    ) -> None:
        super().__init__()
        assert is_expert
        assert not bias
        sizes = [output_size, input_size]
        sizes[self.divided] //= pg_collection.expt_tp.size()
        for index in range(num_gemms):
            self.register_parameter(f"weight{index}", nn.Parameter(torch.empty(sizes)))

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        """Multiply each expert's tokens with its weight."""
        weights = self._parameters.values()
        pieces = zip(torch.split(x, m_splits), weights, strict=True)
        return torch.cat([F.linear(tokens, weight) for tokens, weight in pieces]), None


class GroupedRow(GroupedLinear):
    """The one that is cut by its inputs."""

    divided = 1


def of_this_rank(x: Tensor, dim: int) -> Tensor:
    """Return this context-parallel rank's tokens: one piece from either end, so that causal attention is shared."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return x if size == 1 else by_ranks(x, dim, size)[rank]


def by_ranks(x: Tensor, dim: int, size: int) -> list[Tensor]:
    """Return the tokens of each context-parallel rank."""
    pieces = x.chunk(2 * size, dim)
    return [torch.cat([pieces[rank], pieces[-1 - rank]], dim) for rank in range(size)]


class AttentionInContext(nn.Module):
    """Causal attention over sequences that lie over context-parallel ranks: keys and values of all are gathered."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any, **options: Any) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return ``[tokens of this rank, batch, heads · head]``; queries have more heads than keys and values."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        keys, values = (gather_from_sequence_parallel_region(x, group=self.group) for x in (key, value))
        places = by_ranks(torch.arange(len(keys)), 0, self.group.size())
        seen = places[self.group.rank()].unsqueeze(1) >= torch.cat(places)
        heads = (x.permute(1, 2, 0, 3) for x in (query, keys, values))
        found = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
        return found.permute(2, 0, 1, 3).flatten(2).contiguous()
