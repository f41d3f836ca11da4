"""How a base weight is stored, and how a low-rank delta gets into it.

A storage answers two questions, ``dequantize`` and ``requantize``; merging is written once, in
:mod:`lorica.storage.deltas`, over any of them. :mod:`lorica.storage.kinds` finds the storage of a layer's weight; each
kind is one file.
"""

from lorica.storage.base import Packed, Quantised, Room, Storage
from lorica.storage.deltas import (
    Change,
    MergeError,
    Term,
    add_low_rank_,
    change_of,
    chunks,
    first_not_finite,
    write_values,
)
from lorica.storage.dense import STORAGES, Dense
from lorica.storage.kinds import KINDS, LINEARS, kind_of, storage_of, stored_weight

__all__ = [
    "KINDS",
    "LINEARS",
    "STORAGES",
    "Change",
    "Dense",
    "MergeError",
    "Packed",
    "Quantised",
    "Room",
    "Storage",
    "Term",
    "add_low_rank_",
    "change_of",
    "chunks",
    "first_not_finite",
    "kind_of",
    "storage_of",
    "stored_weight",
    "write_values",
]
