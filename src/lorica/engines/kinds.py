"""Recognising torch's distributed tensors and modules without importing what defines them.

That import takes as long as torch's own. Where there is such an object, somebody has paid for it already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_distributed(value: object) -> TypeIs[DTensor]:
    """Whether a tensor is a ``DTensor``."""
    return type(value).__name__ == "DTensor"


def is_fully_sharded(module: object) -> TypeIs[FSDPModule]:
    """Whether ``fully_shard`` was applied to a module itself."""
    return hasattr(type(module), "_get_fsdp_state")
