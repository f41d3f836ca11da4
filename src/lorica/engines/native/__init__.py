"""Layers that lorica cuts itself, over the axes of a device mesh, with plain local parameters."""

from lorica.engines.native.base import AxisLike, Native
from lorica.engines.native.embedding import ParallelEmbedding
from lorica.engines.native.gqa import GQAQKVColumnParallelLinear
from lorica.engines.native.layers import ColumnParallelLinear, RowParallelLinear
from lorica.engines.native.parallelize import gather_model_state, parallelize

__all__ = [
    "AxisLike",
    "ColumnParallelLinear",
    "GQAQKVColumnParallelLinear",
    "Native",
    "ParallelEmbedding",
    "RowParallelLinear",
    "gather_model_state",
    "parallelize",
]
