"""One readable line for every mistake, no traceback, and an exit code that says whose mistake it was."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import typer

from lorica.cli import rank
from lorica.errors import LoricaError, LostRankError

P = ParamSpec("P")
R = TypeVar("R")

USAGE = 2
INTERRUPTED = 130


def readable(command: Callable[P, R]) -> Callable[P, R]:
    """Turn lorica's and the file system's errors into ``error: …`` on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = command(*args, **kwargs)
            rank.end()
            return result
        except typer.Exit as leaving:
            if leaving.exit_code and rank.is_rank():
                rank.report("", leaving.exit_code, "final")
            raise
        except BrokenPipeError:
            # The reader has seen enough (as in a pipe to head); nothing is left to say, and nobody to say it to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            message, code, kind = _said(error)
            if kind == "bug" and not rank.is_rank():
                raise
            fail(message, code=code, kind=kind)
        raise AssertionError("fail() does not return")

    return wrapped


def _said(error: BaseException) -> tuple[str, int, rank.Kind]:
    """What to say of an error, the exit code, and what kind it is."""
    if isinstance(error, LostRankError):
        return str(error), 1, "lost"
    if isinstance(error, LoricaError):
        return str(error), getattr(error, "exit_code", USAGE), "final"
    if isinstance(error, NotImplementedError):
        return f"not supported yet: {error}", USAGE, "final"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1, "final"
    if isinstance(error, KeyboardInterrupt):
        return "stopped", INTERRUPTED, "final"
    if rank.is_rank():
        from lorica.engines.board import is_lost
        from lorica.train.lost import said_of_lost

        if is_lost(error):
            return said_of_lost(error), 1, "lost"
    return "".join(traceback.format_exception(error)), 1, "bug"


def fail(message: str, *, code: int = USAGE, kind: rank.Kind = "final") -> None:
    """Print the error (a rank: tell the launcher) and leave."""
    if rank.is_rank():
        rank.report(f"error: {message}", code, kind)
    else:
        print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def note(message: str) -> None:
    """Tell the user something that is no result (results go to stdout)."""
    if rank.is_first():
        print(message, file=sys.stderr)


def quiet() -> None:
    """Silence the progress bars and advice of the libraries underneath; ours says what matters."""
    import datasets
    import huggingface_hub
    from transformers.utils import logging as of_transformers

    for noisy in ("torchao", "torch.utils._pytree"):  # what comes with torchao is said of its kernels, at every start
        logging.getLogger(noisy).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Say warnings as one line each, once the block is through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        note(message)
