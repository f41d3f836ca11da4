"""Adapters on models that are cut over ranks: layouts, native layers, gradients, agreement of ranks."""

from lorica.engines.native import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    Pipeline,
    RowParallelLinear,
    gather_model_state,
    next_token_loss,
    parallelize,
    split_stages,
    stage,
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
    "Pipeline",
    "RowParallelLinear",
    "Site",
    "clip_grad_norm_",
    "gather_model_state",
    "get_total_norm",
    "grouped_heads",
    "next_token_loss",
    "parallelize",
    "split_stages",
    "stage",
    "sum_gradients",
    "verify",
]
