"""Interleaved timing, from the package."""

from lorica.bench.timing import Task, excess, interleave, order_of, paired_quartiles

__all__ = ["Task", "excess", "interleave", "order_of", "paired_quartiles"]
