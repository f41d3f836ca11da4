"""Starting a command again as many ranks on this machine, through torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorica.cli import rank
from lorica.errors import RecipeError

if TYPE_CHECKING:
    from lorica.train.recipe import ParallelSection

# Seconds within which a rank that died counts as the cause of the others' failures and not as their consequence: a
# launcher gives ranks thirty before it kills them.
_TOGETHER = 10
_LAST_LINES = 15


def spread(section: ParallelSection, device: str = "auto") -> None:
    """Run this very command on ``section.ranks`` processes and leave with their exit code; return if this is one.

    Raises:
        RecipeError: this machine has too few devices.
        typer.Exit: the ranks are done.
    """
    if section.ranks == 1 or rank.is_rank() or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    _check_devices(section, device)
    with tempfile.TemporaryDirectory(prefix="lorica-") as directory:
        raise typer.Exit(_run(section, Path(directory)))


def _run(section: ParallelSection, directory: Path) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence()
    os.environ[rank.DIRECTORY] = str(directory)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // section.ranks)))
    # Ranks that are asked to stop finish their step and save.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(max(30, int(section.timeout))))
    # A store of its own for every attempt, in which no rank finds the address of one that was lost.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    others = dict.fromkeys(range(1, section.ranks), Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=section.ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=section.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=str(directory / "logs"), redirects=others),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lorica", *sys.argv[1:])
        return 0
    except ChildFailedError as error:
        code, message = rank.read_verdict(directory) or _cause(error.failures, directory)
    except SignalException as stopped:
        unsaved = 128 + int(stopped.sigval), f"stopped by {signal.Signals(stopped.sigval).name} before it was saved"
        code, message = rank.read_verdict(directory) or unsaved
    if message:
        print(message if message.startswith("error: ") else f"error: {message}", file=sys.stderr)
    return code


def _cause(failures: Mapping[int, Any], directory: Path) -> tuple[int, str]:
    """The exit code and the message of the rank that failed first, and not because another had."""
    first = min(failure.timestamp for failure in failures.values())
    killed = []
    for number, failure in failures.items():
        data = failure.error_file_data
        if data.get("kind") == "bug":
            return int(data["code"]), f"rank {number} failed:\n{data['said']}"
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and failure.timestamp <= first + _TOGETHER:
            killed.append(f"rank {number} was killed by {failure.signal_name()}")
    if killed:
        return 1, f"{'; '.join(killed)}. Go on from the newest checkpoint with --resume"
    for failure in failures.values():
        if failure.error_file_data.get("kind") == "lost":
            return 1, str(failure.error_file_data["said"])
    number, failure = next(iter(failures.items()))
    return 1, f"rank {number} left with exit code {failure.exitcode}{_last_words(directory, number)}"


def _last_words(directory: Path, number: int) -> str:
    logs = sorted(directory.glob(f"logs/*/attempt_*/{number}/stderr.log"))
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    return ":\n" + "\n".join(lines[-_LAST_LINES:]) if lines else ""


def _check_devices(section: ParallelSection, device: str) -> None:
    import torch

    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if device.startswith("cpu") or (device == "auto" and found == 0):
        return
    if section.ranks > found:
        raise RecipeError(
            f"parallel asks for {section.ranks} ranks, and this machine has {found} devices. Ask for fewer, start "
            "torchrun on several machines, or set the device to cpu"
        )


def _silence() -> None:
    """torchrun's log repeats at length what is said here in a sentence."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
