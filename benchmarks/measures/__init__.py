"""The measures; importing this package enters them all."""

from benchmarks.measures import training  # isort: skip  (the order of the tables)
from benchmarks.measures import gated  # isort: skip
from benchmarks.measures import dora, layers, lifecycle  # isort: skip
from benchmarks.measures import experts  # isort: skip
from benchmarks.measures import combining, starts, files, merging, optimiser, rows  # isort: skip
from benchmarks.measures import calibration  # isort: skip
from benchmarks.measures import compiled  # isort: skip
from benchmarks.measures import parallel  # isort: skip

__all__ = [
    "calibration",
    "combining",
    "compiled",
    "dora",
    "experts",
    "files",
    "gated",
    "layers",
    "lifecycle",
    "merging",
    "optimiser",
    "parallel",
    "rows",
    "starts",
    "training",
]
