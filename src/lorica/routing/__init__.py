"""Which rows of a batch have which adapter, and which of their tokens it sees: pure bookkeeping, once per forward."""

from lorica.routing.offsets import (
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    last_occurrence,
)
from lorica.routing.rows import BASE, Rows, Run
from lorica.routing.splitting import each_group

__all__ = [
    "BASE",
    "Rows",
    "Run",
    "calculate_alora_offsets",
    "each_group",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "last_occurrence",
]
