"""Stand-ins with the names, attributes and calls of neuronx-distributed's layers, which cannot be installed here.

What they do follows its source (``parallel_layers/layers.py``, ``modules/qkv_linear.py``): a linear hands the
collective of its input to ``_forward_impl`` together with the product; sequences are gathered along
``sequence_dimension``. The collectives are lorica's. That the real package behaves so is not shown by any test.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engines.native import collectives
from lorica.engines.site import Axis

PACKAGE = "neuronx_distributed"


def _axis(group: Any) -> Axis:
    return Axis("tp", group.size(), group.rank(), group)


class _Mappings:
    """``parallel_layers.mappings``."""

    @staticmethod
    def copy_to_tensor_model_parallel_region(x: Tensor, process_group: Any = None) -> Tensor:
        return collectives.enter(x, _axis(process_group))

    @staticmethod
    def reduce_from_tensor_model_parallel_region(x: Tensor, process_group: Any = None) -> Tensor:
        return collectives.leave(x, _axis(process_group))

    @staticmethod
    def gather_from_tensor_model_parallel_region(x: Tensor, process_group: Any = None) -> Tensor:
        return collectives.gather(x, _axis(process_group), -1)

    @staticmethod
    def scatter_to_tensor_model_parallel_region(x: Tensor, process_group: Any = None) -> Tensor:
        return collectives.split(x, _axis(process_group), -1)

    @staticmethod
    def gather_from_sequence_parallel_region(
        x: Tensor, sequence_dimension: int = 0, to_model_parallel: bool = True, process_group: Any = None
    ) -> Tensor:
        assert to_model_parallel
        return collectives.sequence_gather(x, _axis(process_group), sequence_dimension)

    @staticmethod
    def reduce_scatter_to_sequence_parallel_region(
        x: Tensor, sequence_dimension: int = 0, process_group: Any = None
    ) -> Tensor:
        return collectives.sequence_reduce(x, _axis(process_group), sequence_dimension)


M = _Mappings


def _forward_impl(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    async_grad_allreduce: bool,
    sequence_parallel_enabled: bool,
    sequence_dimension: int | None = 0,
    process_group: Any = None,
    **options: Any,
) -> Tensor:
    if sequence_parallel_enabled:
        input = M.gather_from_sequence_parallel_region(input, sequence_dimension or 0, process_group=process_group)
    elif async_grad_allreduce:
        input = M.copy_to_tensor_model_parallel_region(input, process_group)
    return F.linear(input, weight, bias)


def _qkv_forward_impl(
    input: Tensor, weight_qkv: Tensor, output_size_q: int, output_size_kv: int, **options: Any
) -> tuple[Tensor, ...]:
    y = _forward_impl(input, weight_qkv, None, **{name: options[name] for name in options if name != "fuse_qkv"})
    return torch.split(y, [output_size_q, output_size_kv, output_size_kv], dim=-1)


class _Base(nn.Module):
    def __init__(self, group: Any, sequence_parallel: bool, dim: int) -> None:
        super().__init__()
        self.tensor_parallel_group = group
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel, dim
        self.stride, self.pad = 1, False
        self.async_tensor_model_parallel_allreduce = not sequence_parallel
        self._forward_impl: Any = _forward_impl

    def _call(self, x: Tensor, **options: Any) -> Any:
        return self._forward_impl(
            input=x,
            sequence_dimension=self.sequence_dimension,
            process_group=self.tensor_parallel_group,
            reduce_dtype=torch.float32,
            **options,
        )


class ColumnParallelLinear(_Base):
    def __init__(self, weight: Tensor, bias: Tensor | None, whole: tuple[int, int], gather: bool, *place: Any) -> None:
        super().__init__(*place)
        self.output_size, self.input_size = whole
        self.gather_output, self.skip_bias_add = gather, False
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        parallel = self.sequence_parallel_enabled
        y = self._call(
            x, weight=self.weight, bias=None, async_grad_allreduce=not parallel, sequence_parallel_enabled=parallel
        )
        if self.gather_output:
            y = M.gather_from_tensor_model_parallel_region(y, self.tensor_parallel_group)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(_Base):
    def __init__(self, weight: Tensor, bias: Tensor | None, whole: tuple[int, int], *place: Any) -> None:
        super().__init__(*place)
        self.output_size, self.input_size = whole
        self.input_is_parallel, self.skip_bias_add = True, False
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        y = self._call(x, weight=self.weight, bias=None, async_grad_allreduce=False, sequence_parallel_enabled=False)
        group = self.tensor_parallel_group
        if self.sequence_parallel_enabled:
            y = M.reduce_scatter_to_sequence_parallel_region(y, self.sequence_dimension, group)
        else:
            y = M.reduce_from_tensor_model_parallel_region(y, group)
        return y if self.bias is None else y + self.bias


class ParallelEmbedding(nn.Module):
    def __init__(self, table: Tensor, group: Any, across: bool, sequence_parallel: bool) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self.tensor_model_parallel_group, self.shard_across_embedding = group, across
        self.sequence_parallel_enabled, self.padding_idx, self.pad = sequence_parallel, None, False
        piece = table.chunk(group.size(), 1 if across else 0)[group.rank()].contiguous()
        self.start_index = group.rank() * len(piece)
        self.end_index = self.start_index + len(piece)
        self.weight = nn.Parameter(piece)

    def forward(self, ids: Tensor) -> Tensor:
        group = self.tensor_model_parallel_group
        if self.shard_across_embedding:
            return M.gather_from_tensor_model_parallel_region(F.embedding(ids, self.weight), group)
        here = (ids >= self.start_index) & (ids < self.end_index)
        rows = F.embedding((ids - self.start_index) * here, self.weight) * here.unsqueeze(-1)
        if self.sequence_parallel_enabled:
            return M.reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), 0, group)
        return M.reduce_from_tensor_model_parallel_region(rows, group)


class GQAQKVColumnParallelLinear(_Base):
    def __init__(self, weight: Tensor, sizes: tuple[int, int], local: tuple[int, int], fuse: bool, *place: Any) -> None:
        super().__init__(*place)
        self.input_size, self.output_sizes, self.fuse_qkv = weight.shape[1], list(sizes), fuse
        self.q_output_size_per_partition, self.kv_output_size_per_partition = local
        self.gather_output = False
        self.weight_qkv = nn.Parameter(weight)
        self._forward_impl = _qkv_forward_impl

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parallel = self.sequence_parallel_enabled
        return self._call(
            x,
            weight_qkv=self.weight_qkv,
            fuse_qkv=True,
            output_size_q=self.q_output_size_per_partition,
            output_size_kv=self.kv_output_size_per_partition,
            async_grad_allreduce=not parallel,
            sequence_parallel_enabled=parallel,
        )


def put_in_place(*, trainer: bool = False) -> None:
    """Let this process find the package."""
    names = ["", ".parallel_layers", ".parallel_layers.layers", ".parallel_layers.mappings", ".modules"]
    names += [".modules.qkv_linear", ".parallel_layers.parallel_state", *([".trainer"] if trainer else [])]
    for name in names:
        sys.modules[f"{PACKAGE}{name}"] = ModuleType(f"{PACKAGE}{name}")
    for cls in (ColumnParallelLinear, RowParallelLinear, ParallelEmbedding):
        cls.__module__ = f"{PACKAGE}.parallel_layers.layers"
    GQAQKVColumnParallelLinear.__module__ = f"{PACKAGE}.modules.qkv_linear"
    inside: Any = sys.modules[f"{PACKAGE}.parallel_layers"]
    inside.mappings = _Mappings
    sys.modules[f"{PACKAGE}.parallel_layers.mappings"] = _Mappings  # type: ignore[assignment]
    state: Any = sys.modules[f"{PACKAGE}.parallel_layers.parallel_state"]
    state.model_parallel_is_initialized = lambda: True
    state.get_tensor_model_parallel_group = lambda: dist.group.WORLD
    state.get_data_parallel_group = lambda: None
    state.get_pipeline_model_parallel_group = lambda: None
