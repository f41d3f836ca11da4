"""Cases that fail on purpose, for ``test_world.py``."""

from __future__ import annotations

import torch.distributed as dist
import world


@world.case(ranks=2)
def first_passes() -> None:
    assert dist.get_world_size() == 2


@world.case(ranks=2)
def second_fails_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.barrier()


@world.case(ranks=2)
def third_fails() -> None:
    raise ValueError("of the third")
