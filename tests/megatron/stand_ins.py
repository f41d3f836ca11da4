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
