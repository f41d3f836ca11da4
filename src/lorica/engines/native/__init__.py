"""Layers that lorica cuts itself, over the axes of a device mesh, with plain local parameters."""

from lorica.engines.native.base import AxisLike, Native
from lorica.engines.native.embedding import ParallelEmbedding
from lorica.engines.native.gqa import GQAQKVColumnParallelLinear
from lorica.engines.native.layers import ColumnParallelLinear, RowParallelLinear
from lorica.engines.native.parallelize import gather_model_state, parallelize
from lorica.engines.native.pipeline import Pipeline, next_token_loss, split_stages, stage

__all__ = [
    "AxisLike",
    "ColumnParallelLinear",
    "GQAQKVColumnParallelLinear",
    "Native",
    "ParallelEmbedding",
    "Pipeline",
    "RowParallelLinear",
    "gather_model_state",
    "next_token_loss",
    "parallelize",
    "split_stages",
    "stage",
]
