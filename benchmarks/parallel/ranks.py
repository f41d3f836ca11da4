"""A function on many ranks: processes of their own, gloo, one thread each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.suite import quiet
from lorica.bench import machine


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` on every rank and return what the first returned.

    Args:
        ranks: how many.
        function: defined at the level of a module; returns plain JSON values.
        args: pickled; the same for all ranks.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        multiprocessing.start_processes(
            _main, (ranks, folder, function, args), nprocs=ranks, join=True, start_method="spawn"
        )
        return json.loads(Path(folder, "result").read_text(encoding="utf-8"))


def _main(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    with quiet():
        result = function(*args)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
