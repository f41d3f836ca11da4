"""Process groups that outlive a division: the next one has the same groups where it has the same ranks in them.

Megatron-Core makes a group for each of thirty purposes and each set of ranks, some 80 for two ranks and 150 for four;
each has threads and sockets, and together they take longer than a step of a tiny model. Groups of different purposes
stay different groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch.distributed as dist

_new_group = dist.new_group
_KEPT: dict[tuple[Any, ...], Any] = {}


def made() -> AbstractContextManager[Any]:
    """In this context ``new_group`` gives what there is; all ranks ask for the same groups in the same order."""
    return mock.patch.object(dist, "new_group", _given)


def not_destroyed() -> AbstractContextManager[Any]:
    """In this context no group is destroyed."""
    return mock.patch.object(dist, "destroy_process_group")


def among(group: Any) -> bool:
    """Whether a group is one of those that are kept."""
    return any(group is kept for kept in _KEPT.values())


def _given(ranks: Sequence[int], *, backend: str | None = None, group_desc: str | None = None, **options: Any) -> Any:
    key = (tuple(ranks), backend, group_desc)
    if key not in _KEPT:
        _KEPT[key] = _new_group(list(ranks), backend=backend, group_desc=group_desc, **options)
    return _KEPT[key]
