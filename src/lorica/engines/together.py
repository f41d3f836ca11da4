"""All ranks succeed, or all of them fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from lorica.engines.board import Board, is_lost
from lorica.engines.describe import Engines
from lorica.errors import RankError

_FAILED = "failed"


@contextmanager
def together(model: nn.Module, what: str) -> Iterator[None]:
    """Run a block that every rank of a divided model runs; where it failed on one, raise on the others too.

    Args:
        model: the base model; where nothing of it lies over ranks, this does nothing.
        what: what the block does, for messages.

    Raises:
        RankError: it succeeded here and failed elsewhere; the message names the rank and has its error. Where a rank
            failed before a collective that the block has, the others wait for it as long as their process group does.
    """
    if not Engines(model).axes:
        yield
        return
    board = Board.of_all("together")
    try:
        yield
    except Exception as error:
        _tell(board, what, error)
        raise
    try:
        failed = _everyone(None)
    except RuntimeError as lost:
        _refuse_lost(board, what, lost)
        raise
    _refuse_failure(failed, what)


def _tell(board: Board | None, what: str, error: Exception) -> None:
    """Let the other ranks know of an error here; where it is that they failed, say so.

    Raises:
        RankError: another rank failed and was missed here.
    """
    if is_lost(error):
        _refuse_lost(board, what, error)
        return  # who does not answer would be waited for again
    said = f"{type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):  # the error is told in any case
        if board is not None:
            board.first(_FAILED, f"rank {board.rank}: {said}")
        _everyone(said)


def _refuse_lost(board: Board | None, what: str, error: BaseException) -> None:
    known = None
    with contextlib.suppress(RuntimeError):  # the store may be gone too
        known = None if board is None else board.read(_FAILED)
    if known is not None:
        raise RankError(f"{what} failed, so it is undone on all ranks: {known}") from error


def _everyone(mine: str | None) -> list[str | None]:
    """Return what went wrong on each rank."""
    failed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failed, mine)
    return failed


def _refuse_failure(failed: list[str | None], what: str) -> None:
    wrong = [(rank, text) for rank, text in enumerate(failed) if text is not None]
    if wrong:
        shown = "; ".join(f"rank {rank}: {text}" for rank, text in wrong[:4])
        raise RankError(f"{what} failed on {len(wrong)} of {len(failed)} ranks, so it is undone on all: {shown}")
