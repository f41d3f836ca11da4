"""Laying a base model over the ranks of a run."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from lorica import parallel
from lorica.adapt.inject import base_of
from lorica.errors import LayoutError, RecipeError
from lorica.ranks.agreement import sample
from lorica.train import models
from lorica.train.ranks import Ranks, limit_waiting
from lorica.train.recipe import ParallelSection


def load_base(section: ParallelSection, ranks: Ranks, where: torch.device, path: str, **options: Any) -> Any:
    """A causal language model that lies over the ranks as the recipe says; options as in ``models.load_base``.

    Raises:
        RecipeError: it is not there, or cannot be cut so.
    """
    if ranks.mesh is None or section.cut_by == "native":
        base = models.load_base(path, where=where, **options)
        ranks.compare({"weights of the base model": _sampled(base)})
        lay_out(base, section, ranks)
    else:
        base = models.load_base(path, distributed=_transformers(section, ranks), **options)
    limit_waiting(timedelta(seconds=section.timeout))
    return base


def _sampled(base: nn.Module) -> str:
    """A hash of some numbers of every weight, and of all names, shapes and dtypes: another model has another one."""
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        digest.update(f"{name} {sample(parameter.data)}".encode())
    return digest.hexdigest()


def _transformers(section: ParallelSection, ranks: Ranks) -> Any:
    from transformers.distributed import DistributedConfig

    size = ranks.axes.get
    return DistributedConfig(
        tp_size=size("tp", 1), fsdp_size=size("fsdp", 1), dp_replicate_size=size("dp", 1), ep_size=section.ep
    )


def lay_out(base: Any, section: ParallelSection, ranks: Ranks) -> None:
    """Cut a base model in place as the recipe says, and tell it over which axes the rows of its batches are divided.

    Raises:
        RecipeError: the model cannot be cut so; says why.
    """
    if ranks.mesh is None:
        return
    if set(ranks.axes) == {"dp"}:  # nothing is cut, so any model will do
        base.lorica_mesh = {"dp": parallel.Axis.of(ranks.mesh, 0)}
        return
    try:
        parallel.parallelize(base, ranks.mesh, sequence_parallel=section.sp)
        if "pp" in ranks.axes:
            parallel.split_stages(base, ranks.mesh)
    except LayoutError as error:
        raise RecipeError(f"parallel: {error}") from error


def stages(model: Any) -> parallel.Axis | None:
    """The axis of the stages that a model is split into; None where it is in one piece."""
    axis: parallel.Axis | None = getattr(base_of(model), "lorica_mesh", {}).get("pp")
    return axis
