"""torchrun replaces ranks that were lost, and the run is the uninterrupted one: four ranks, another lost each time.

The agent is torchrun's own; the ranks are forked from a process that has everything imported.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import ranks
from rank_faults import attempt, prepare
from rank_phases import PHASES
from test_ranks_phases import final_state, settings

from lorica.train import job, recipe

#: Phase, rank and fault of each attempt.
LOST = (
    ("the starts", 3, "kill"),
    ("the backward", 1, "error"),
    ("the old checkpoints", 0, "error"),
    ("the shards", 2, "kill"),
    ("the shards that are read", 2, "error"),
    ("the last files", 1, "kill"),
)


def one_rank(values: dict[str, Any]) -> int:
    """Train, with the fault of this attempt; return the number of the attempt that came to the end."""
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if restarts < len(LOST):
        name, victim, fault = LOST[restarts]
        if int(os.environ["RANK"]) == victim:
            next(phase for phase in PHASES if phase.name == name).at.arm(fault)
    job.run(recipe.parse(values), progress=False, notify=lambda _: None)
    return restarts


def launch(values: dict[str, Any], count: int, folder: Path) -> list[int]:
    """What ``torchrun --max-restarts`` does."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    prepare(values)
    os.environ["STRUCK"] = str(folder)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "60"
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # which may not fork
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="replaced",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=len(LOST),
        monitor_interval=0.05,
        start_method="fork",
    )
    found: dict[int, int] = elastic_launch(config, one_rank)(values)
    return [found[rank] for rank in range(count)]


def alone(values: dict[str, Any], count: int, folder: Path) -> list[int]:
    prepare(values)
    return [outcome.code for outcome in attempt(values, count, folder)]


def test_ranks_are_replaced_as_often_as_they_are_lost(base: Path, data_file: Path, tmp_path: Path) -> None:
    whole, cut = (settings(base, data_file, tmp_path / name, 4) for name in ("whole", "cut"))
    assert ranks.run(1, alone, whole, 4, tmp_path / "one try", timeout=600) == [[0, 0, 0, 0]]
    assert ranks.run(1, launch, cut, 4, tmp_path, timeout=900) == [[len(LOST)] * 4]
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")
