"""One readable line for every mistake, no traceback, and an exit code that says whose mistake it was."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from lorica.errors import LoricaError

P = ParamSpec("P")
R = TypeVar("R")

USAGE = 2
INTERRUPTED = 130


def readable(command: Callable[P, R]) -> Callable[P, R]:
    """Turn lorica's and the file system's errors into ``error: …`` on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except LoricaError as error:
            fail(str(error), code=getattr(error, "exit_code", USAGE))
        except NotImplementedError as error:
            fail(f"not supported yet: {error}")
        except BrokenPipeError:
            # The reader has seen enough (as in a pipe to head); nothing is left to say, and nobody to say it to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", code=1)
        except KeyboardInterrupt:
            fail("stopped", code=INTERRUPTED)
        raise AssertionError("fail() does not return")

    return wrapped


def fail(message: str, *, code: int = USAGE) -> None:
    """Print the error and leave."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def note(message: str) -> None:
    """Tell the user something that is no result (results go to stdout)."""
    print(message, file=sys.stderr)


def quiet() -> None:
    """Silence the progress bars and advice of the libraries underneath; ours says what matters."""
    import datasets
    import huggingface_hub
    from transformers.utils import logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
