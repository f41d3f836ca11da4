"""The way into the forward of Megatron's layers: between the collective of the input and that of the output.

::

    column:  input ─ gather the sequence | copy ─ product ─ (gather)       row:  input ─ product ─ reduce (scatter)

What stands in a layer's method while an adapter is on it is in :mod:`lorica.engines.inside`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engines.inside import Inside, InsideOpening


class _Linear(Inside):
    """In the place of ``_forward_impl`` of a linear layer."""

    method = "_forward_impl"

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **options: Any,
    ) -> Any:
        from megatron.core.tensor_parallel import mappings

        if sequence_parallel:
            input = mappings.gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=tp_group
            )
        elif allreduce_dgrad:
            input = mappings.copy_to_tensor_model_parallel_region(input, group=tp_group)
        return self.product(input, weight=weight, bias=bias, tp_group=tp_group, **options)

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        result: Tensor = self.own(x, allreduce_dgrad=False, sequence_parallel=False, **options)
        return result


class _Embedding(Inside):
    """In the place of ``forward`` of an embedding that is cut by words.

    What ``product`` gets are ids of the whole vocabulary, and it returns zeros for those of other ranks.
    """

    method = "forward"

    def __call__(self, input_: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        module, rows = self.module, self.product(input_)
        if module.reduce_scatter_embeddings:  # [batch, tokens, …] becomes [tokens of this rank, batch, …]
            scattered: Tensor = mappings.reduce_scatter_to_sequence_parallel_region(
                rows.transpose(0, 1).contiguous(), group=module.tp_group
            )
            return scattered
        reduced: Tensor = mappings.reduce_from_tensor_model_parallel_region(rows, group=module.tp_group)
        return reduced

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        module = self.module
        if module.tp_group is None or module.tp_group.size() == 1:
            return self._rows(x)
        elsewhere = (x < module.vocab_start_index) | (x >= module.vocab_end_index)
        rows = self._rows((x - module.vocab_start_index).masked_fill(elsewhere, 0))
        return rows.masked_fill(elsewhere.unsqueeze(-1), 0)

    def _rows(self, ids: Tensor) -> Tensor:
        weight: Tensor = self.module.weight
        return weight[ids] if self.module.deterministic_mode else F.embedding(ids, weight)


class MegatronOpening(InsideOpening):
    """The way into a layer's product.

    Args:
        module: the layer.
        lookup: whether it is an embedding.
    """

    def __init__(self, module: nn.Module, *, lookup: bool) -> None:
        super().__init__(module, _Embedding if lookup else _Linear)


__all__ = ["MegatronOpening"]
