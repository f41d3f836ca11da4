"""What a run would need on many ranks, found out on one process: the code that runs, on ranks that are not there."""

from lorica.parallel.plan.division import Division, divide, divisions, fake_ranks
from lorica.parallel.plan.outline import Outline, empty_model
from lorica.parallel.plan.plan import PARTS, Plan, Planner, Refused, other_ways, search
from lorica.parallel.plan.step import Step, Work

__all__ = [
    "PARTS",
    "Division",
    "Outline",
    "Plan",
    "Planner",
    "Refused",
    "Step",
    "Work",
    "divide",
    "divisions",
    "empty_model",
    "fake_ranks",
    "other_ways",
    "search",
]
