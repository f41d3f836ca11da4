"""All ranks succeed, or all of them fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from lorica.engines.describe import Engines
from lorica.errors import RankError


@contextmanager
def together(model: nn.Module, what: str) -> Iterator[None]:
    """Run a block that every rank of a divided model runs; where it failed on one, raise on the others too.

    Args:
        model: the base model; where nothing of it lies over ranks, this does nothing.
        what: what the block does, for messages.

    Raises:
        RankError: it succeeded here and failed elsewhere; the message names the rank and has its error.
    """
    if not Engines(model).axes:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
        raise
    finally:
        failed: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failed, None if error is None else f"{type(error).__name__}: {error}")
        _refuse_failure(failed, what, here=error is not None)


def _refuse_failure(failed: list[str | None], what: str, *, here: bool) -> None:
    wrong = [(rank, text) for rank, text in enumerate(failed) if text is not None]
    if wrong and not here:
        shown = "; ".join(f"rank {rank}: {text}" for rank, text in wrong[:4])
        raise RankError(f"{what} failed on {len(wrong)} of {len(failed)} ranks, so it is undone on all: {shown}")
