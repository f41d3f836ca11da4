"""Adapters on models that are cut over ranks: layouts, native layers, gradients, agreement of ranks."""

from lorica.engines.native import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    gather_model_state,
    parallelize,
)
from lorica.engines.site import Axis, Site
from lorica.layout import Cut, HeadOrder, Layout, grouped_heads
from lorica.ranks import clip_grad_norm_, get_total_norm, sum_gradients, verify

__all__ = [
    "Axis",
    "ColumnParallelLinear",
    "Cut",
    "GQAQKVColumnParallelLinear",
    "HeadOrder",
    "Layout",
    "ParallelEmbedding",
    "RowParallelLinear",
    "Site",
    "clip_grad_norm_",
    "gather_model_state",
    "get_total_norm",
    "grouped_heads",
    "parallelize",
    "sum_gradients",
    "verify",
]
