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
from lorica.engines.native.specs import specs_of
from lorica.engines.site import Axis, Site
from lorica.layers.shards import merge_shard_
from lorica.layout import Cut, HeadOrder, Layout, grouped_heads
from lorica.layout.neuron import specs_from_neuron
from lorica.layout.specs import Spec, WeightSpecs
from lorica.parallel.cutting import cutting
from lorica.ranks import GradScaler, clip_grad_norm_, get_total_norm, parameter_groups, sum_gradients, verify

__all__ = [
    "Axis",
    "ColumnParallelLinear",
    "Cut",
    "GQAQKVColumnParallelLinear",
    "GradScaler",
    "HeadOrder",
    "Layout",
    "ParallelEmbedding",
    "Pipeline",
    "RowParallelLinear",
    "Site",
    "Spec",
    "WeightSpecs",
    "clip_grad_norm_",
    "cutting",
    "gather_model_state",
    "get_total_norm",
    "grouped_heads",
    "merge_shard_",
    "next_token_loss",
    "parallelize",
    "parameter_groups",
    "specs_from_neuron",
    "specs_of",
    "split_stages",
    "stage",
    "sum_gradients",
    "verify",
]
