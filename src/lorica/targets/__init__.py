"""Which modules an adapter goes into: matching names, the usual targets, and the plan."""

from lorica.targets.plan import Plan, Target, make_plan

__all__ = ["Plan", "Target", "make_plan"]
