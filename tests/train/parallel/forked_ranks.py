"""A command that starts ranks of its own, with its launcher, but ranks that are forked and not started anew.

A start imports torch and transformers, which costs more than all that these runs do. What is forked has the launcher's
environment, its redirected outputs and its signals, and ends as a process of its own ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ranks


class Done(NamedTuple):
    """What became of a command."""

    code: int
    said: str
    trouble: str


def launch(
    folder: Path, *arguments: str, change: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> Done:
    """Run ``lorica``, of which each rank first calls ``change(*given)``."""
    (done,) = ranks.run(1, _command, folder, arguments, change, given, timeout=600)
    return done


def _command(folder: Path, arguments: tuple[str, ...], change: Callable[..., None] | None, given: Any) -> Done:
    import torch.distributed as dist
    from torch.distributed.launcher import api

    import lorica.train.job  # noqa: F401 (which the ranks then have)
    from lorica.cli import main

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # which may not fork
    logging.getLogger("torch.multiprocessing.spawn").setLevel(
        logging.ERROR
    )  # it tells whom it ends; an exec's is silent
    original = api.elastic_launch

    def rank(*started: str) -> None:
        assert started[:2] == ("-m", "lorica")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's own handlers end with an exec
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if change is not None:
            change(*given)
        sys.argv = ["lorica", *started[2:]]
        try:
            main()
        except SystemExit as left:
            if left.code:
                raise

    def forked(config: Any, executable: str) -> Callable[..., Any]:
        assert executable == sys.executable
        config.start_method, config.monitor_interval = "fork", 0.05
        return original(config, rank)

    api.elastic_launch = forked
    sys.argv = ["lorica", *arguments]
    for number, name in ((1, "said"), (2, "trouble")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 0
    try:
        main()
    except SystemExit as left:
        code = int(left.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return Done(code, (folder / "said").read_text(), (folder / "trouble").read_text())
