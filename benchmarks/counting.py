"""Counts of what a call does, from the package."""

from lorica.bench.counting import QUANTITIES, KernelCounter, SavedBytes, count, tensor_bytes

__all__ = ["QUANTITIES", "KernelCounter", "SavedBytes", "count", "tensor_bytes"]
