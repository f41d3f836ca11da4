"""Laying a base model over the ranks of a run."""

from __future__ import annotations

from typing import Any

from lorica import parallel
from lorica.adapt.inject import base_of
from lorica.errors import LayoutError, RecipeError
from lorica.train.ranks import Ranks
from lorica.train.recipe import ParallelSection


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
