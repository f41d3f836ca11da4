"""Training on torch's parts: ``lorica.train.run(recipe)`` and the pieces it is made of.

recipe (what is asked) → sources, data, collate (rows → examples → batches) → models, optim (what is trained) → loop →
state, metrics (what is kept and reported); evaluate (loss, exact match); job puts them together.
"""

from lorica.train.job import Result, run
from lorica.train.recipe import Recipe, load, parse

__all__ = ["Recipe", "Result", "load", "parse", "run"]
