"""Training on torch's parts: ``lorica.train.run(recipe)`` and the pieces it is made of.

recipe (what is asked) → sources, data, collate (rows → examples → batches) → models, optim (what is trained) → loop →
tensors, state, metrics (what is kept and reported); evaluate (loss, exact match); ranks, layouts, pipeline (where there
are several processes); job puts them together.
"""

from typing import TYPE_CHECKING, Any

from lorica.train.recipe import Recipe, load, parse

if TYPE_CHECKING:
    from lorica.train.job import Result, run

__all__ = ["Recipe", "Result", "load", "parse", "run"]


def __getattr__(name: str) -> Any:
    # A recipe is read, and ranks are started, without what only training needs.
    if name in ("Result", "run"):
        from lorica.train import job

        return getattr(job, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
