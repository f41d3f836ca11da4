"""This process as one rank of a command: who speaks, and how a failure reaches the launcher.

A rank that fails writes what it has to say into torchrun's error file. Where ``lorica`` itself is the launcher, it
says it, once; a mistake that another try would only repeat is also left as the *verdict* in the launcher's directory,
and ranks that find one leave at once instead of trying again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Literal

DIRECTORY = "LORICA_LAUNCH_DIRECTORY"
"""Where the launcher's directory is; unset under torchrun."""
VERDICT = "verdict.json"

Kind = Literal["final", "lost", "bug"]
"""A mistake or a stop that stands; another rank that did not answer; anything unexpected."""


def is_rank() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return not is_rank() or os.environ["RANK"] == "0"


def begin() -> None:
    """Leave if the verdict is known; let only the first rank print results.

    Raises:
        SystemExit: there is a verdict.
    """
    if not is_rank():
        return
    directory = os.environ.get(DIRECTORY)
    if directory and (found := read_verdict(Path(directory))) is not None:
        raise SystemExit(found[0])
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def end() -> None:
    """Take down what connects this rank with the others, if there are any."""
    if not is_rank():
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def report(message: str, code: int, kind: Kind) -> None:
    """Tell the launcher why this rank is about to leave with ``code``."""
    torchruns = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    content = {"message": torchruns, "said": message, "code": code, "kind": kind}
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    if directory := os.environ.get(DIRECTORY):
        if kind == "final":
            _write_once(Path(directory) / VERDICT, json.dumps(content))
    elif message and (is_first() or kind != "final"):
        # A mistake in what was asked is every rank's, so one says it.
        print(message, file=sys.stderr)


def read_verdict(directory: Path) -> tuple[int, str] | None:
    """The exit code and the message that a rank left for good, if one did."""
    try:
        found = json.loads((directory / VERDICT).read_text(encoding="utf-8"))
        return int(found["code"]), str(found["said"])
    except (OSError, ValueError, KeyError):
        return None


def _write_once(path: Path, text: str) -> None:
    """Write the file whole, unless another rank did."""
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(text, encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(own)
    own.unlink()
