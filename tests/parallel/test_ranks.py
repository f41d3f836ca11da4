"""The harness itself: values come back, failures are told rank by rank, and no case touches the next."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import PATIENCE, RankError, run
from torch import Tensor


def _sum(start: Tensor) -> tuple[int, Tensor, float]:
    total = start + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total, float(torch.rand(()))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_values_come_back_in_order(size: int) -> None:
    found = run(size, _sum, torch.ones(3))
    assert [rank for rank, _, _ in found] == list(range(size))
    assert all(torch.equal(total, torch.full((3,), size + sum(range(size)))) for _, total, _ in found)
    assert len({random for _, _, random in found}) == 1


def _surroundings() -> tuple[str, str, str, int]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("GIVEN", ""), torch.get_num_threads()


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "by the caller")
    assert run(2, _surroundings) == [("0", "2", "by the caller", 1), ("1", "2", "by the caller", 1)]


def _one_fails() -> None:
    print("on its way")
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.barrier()


def test_one_rank_fails_and_another_waits_for_it() -> None:
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        run(2, _one_fails)
    assert time.monotonic() - begin < PATIENCE / 2
    message = str(caught.value)
    assert caught.value.failed == {1: "ValueError: of rank 1"}
    assert "rank 1 failed" in message
    assert "in _one_fails" in message
    assert "rank 0 was killed" in message
    assert "barrier" in message
    assert "on its way" in message


def _hangs() -> None:
    time.sleep(1000 if dist.get_rank() == 0 else 0)


def test_a_rank_hangs() -> None:
    run(2, dist.get_world_size)  # the server of forks has started
    with pytest.raises(RankError, match=r"not done in 8(?s:.*)rank 0 was killed(?s:.*)in _hangs(?s:.*)rank 1 returned"):
        run(2, _hangs, timeout=8)


def _dies() -> None:
    if dist.get_rank() == 0:
        os._exit(3)


def test_a_rank_dies() -> None:
    with pytest.raises(RankError, match="the process died\nexit code 3"):
        run(2, _dies)
    assert run(2, dist.get_world_size) == [2, 2]


def _crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_rank_crashes() -> None:
    with pytest.raises(RankError, match=r"exit code -11(?s:.*)in _crashes"):
        run(2, _crashes)


def _warns() -> None:
    warnings.warn("look out", UserWarning, stacklevel=1)


def test_warnings_are_errors() -> None:
    with pytest.raises(RankError, match="UserWarning: look out"):
        run(2, _warns)


@pytest.mark.filterwarnings("ignore:look out")
def test_unless_the_test_says_otherwise() -> None:
    assert run(2, _warns) == [None, None]
