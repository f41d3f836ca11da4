"""The rank that keeps the store through which ranks know of each other dies: the others still end, and say so."""

from __future__ import annotations

import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
from rank_faults import SOON, Outcome, attempt_to, strike

from lorica.train import lost


def _without_the_keeper(rank: int, port: int) -> None:
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    with lost.answered() as company:
        company.met()
        dist.barrier()
        if rank == 0:
            strike("kill")
        dist.all_reduce(torch.ones(1))


def _hangs(rank: int) -> None:
    from datetime import timedelta

    from lorica.train.ranks import limit_waiting

    with lost.answered() as company:
        company.met()
        dist.barrier()
        limit_waiting(timedelta(seconds=1))
        if rank == 1:
            struck = Path(os.environ["STRUCK"])
            struck.touch()
            deadline = time.monotonic() + SOON
            while not all((struck.parent / f"said-{other}").exists() for other in (0, 2)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os._exit(0)
        dist.all_reduce(torch.ones(1))


def _try(folder: Path) -> tuple[list[Outcome], list[Outcome]]:
    if dist.is_initialized():
        dist.destroy_process_group()
    lost.BEAT, lost.PATIENCE = 0.1, 1.0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return attempt_to(partial(_without_the_keeper, port=port), 3, folder / "store"), attempt_to(
        _hangs, 3, folder / "hang"
    )


def test_a_store_that_is_gone_and_a_rank_that_hangs(tmp_path: Path) -> None:
    ((keeper, *others), hanging) = ranks.run(1, _try, tmp_path, timeout=300)[0]
    assert keeper.code == -signal.SIGKILL
    for outcome in others:
        assert outcome.kind == "LostRankError"
        assert "the store of the ranks is gone with the process that kept it" in outcome.said, others
        assert outcome.late < SOON
    for outcome in (hanging[0], hanging[2]):
        assert outcome.kind == "LostRankError", hanging
        assert "rank 1 lives and does something else" in outcome.said, hanging
