"""The command starts its own ranks; what ends them, and how it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked_ranks
import many
import pytest
import ranks
import yaml

import runs
from lorica.cli import rank
from lorica.errors import RecipeError
from lorica.train import job, recipe, signals, state
from lorica.train.loop import Trainer
from lorica.train.ranks import limit_waiting

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
#: Seconds that a command may take on a slow machine with other work.
LONG = 300.0


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = runs.settings(base, data, output, lora__lora_dropout=0.1, **changes)
    values["training"] |= {"eval_every": None, "steps": 10}
    values["log"] = {"every": 1}
    values["parallel"] = {"dp": 2}
    return values


def write(folder: Path, values: dict[str, Any]) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def start(*arguments: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does; its ranks are processes that import everything anew."""
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *runner, "-m", "lorica", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LONG, check=False)


@pytest.fixture(scope="module")
def uninterrupted(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return many.run(2, settings(base, data_file, tmp_path_factory.mktemp("whole") / "out"))


def at_step(number: int, act: Callable[[], object]) -> None:
    """Let a rank do something before it begins this step (from 0)."""
    original = Trainer.step

    def step(self: Trainer) -> Any:
        if self.live.progress.step == number:
            act()
        return original(self)

    Trainer.step = step  # type: ignore[method-assign]


def die_once() -> None:
    """Kill the last rank in its fifth step, the first time."""
    if os.environ["RANK"] == "1" and not job.ranks.restarted():
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_rank_is_replaced_and_the_run_goes_on_bit_for_bit(
    base: Path, data_file: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    file = write(tmp_path, settings(base, data_file, tmp_path / "cut"))
    done = forked_ranks.launch(tmp_path, "train", file, "-q", "parallel.max_restarts=1", change=die_once)
    assert done.code == 0, done
    assert done.trouble.count("Resuming after step 3") == 1, done
    assert done.said.count("adapter") == 2, done  # one line with one path
    assert many.records(tmp_path / "cut") == uninterrupted


def terminate_the_launcher() -> None:
    """Let the first rank do so in its fifth step, in which all ranks wait until they are told."""
    note, told = signals.StopRequest._note, threading.Event()

    def noted(self: signals.StopRequest, *arguments: Any) -> None:
        note(self, *arguments)
        told.set()

    def act() -> None:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
        assert told.wait(LONG / 3)

    signals.StopRequest._note = noted  # type: ignore[method-assign]
    at_step(4, act)


def test_a_signal_reaches_the_ranks_which_save_and_go_on(
    base: Path, data_file: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    values = settings(base, data_file, tmp_path / "cut")
    file = write(tmp_path, values)
    done = forked_ranks.launch(tmp_path, "train", file, "-q", change=terminate_the_launcher)
    assert done.code == 143, done
    assert done.said == ""
    assert done.trouble.count("Stopped by SIGTERM after step 5") == 1, done
    assert done.trouble.count(f"Continue with: lorica train {file} --resume") == 1, done
    assert "error" not in done.trouble
    assert state.complete(tmp_path / "cut")[-1].name == "step-000005"
    assert many.records(tmp_path / "cut")[-1]["step"] == 5
    assert many.run(2, values, resume=True) == uninterrupted


def test_torchrun_runs_the_command_as_it_is(base: Path, data_file: Path, tmp_path: Path) -> None:
    values = settings(base, data_file, tmp_path / "out")
    values["training"]["steps"] = 2
    values["parallel"] = {}  # the ranks that are there are replicas
    done = start("train", write(tmp_path, values), "-q", torchrun=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter") == 2, done.stdout
    numbers = json.loads((state.complete(tmp_path / "out")[-1] / "state.json").read_text())
    assert numbers["axes"] == {"dp": 2}


def test_a_verdict_stands_and_ranks_that_find_one_leave_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", rank.DIRECTORY: str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    rank.begin()
    rank.report("error: a lost rank", 1, "lost")
    rank.begin()  # another try may go better
    rank.report("error: a mistake", 2, "final")
    rank.report("error: another", 1, "final")
    assert rank.read_verdict(tmp_path) == (2, "error: a mistake")
    with pytest.raises(SystemExit) as left:
        rank.begin()
    assert left.value.code == 2


def test_a_mistake_that_only_ranks_find_is_told_once(base: Path, data_file: Path, tmp_path: Path) -> None:
    file = write(tmp_path, settings(base, data_file, tmp_path / "out") | {"parallel": {"tp": 3}})
    done = forked_ranks.launch(tmp_path, "train", file, "-q", "parallel.max_restarts=0")
    assert (done.code, done.said) == (2, ""), done
    assert done.trouble.count("do not divide over 3 ranks") == 1, done
    assert done.trouble.startswith("error: parallel: model.layers.0.self_attn"), done
    assert not (tmp_path / "out").exists()


def test_the_command_starts_its_own_ranks(data_file: Path, tmp_path: Path) -> None:
    done = start("train", write(tmp_path, settings(tmp_path / "nowhere", data_file, tmp_path / "out")), "-q")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("nowhere") == 1, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert not (tmp_path / "out").exists()


def fail_before_the_ranks_meet(kind: str) -> None:
    """Let the last rank end before it comes to where it would wait for the others."""
    import torch.distributed as dist

    def device(name: str) -> Any:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"mistake": RecipeError("a mistake"), "bug": ZeroDivisionError("a bug")}[kind]

    if os.environ["RANK"] == "1":
        job.ranks.device = device
    else:
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        ("mistake", 2, "error: a mistake"),
        ("bug", 1, "error: rank 1 failed:"),
        ("killed", 1, "error: rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_ends_before_they_meet_ends_the_others_at_once(
    kind: str, code: int, says: str, base: Path, data_file: Path, tmp_path: Path
) -> None:
    values = settings(base, data_file, tmp_path / "out")
    values["parallel"]["timeout"] = 2 * LONG  # as long as ranks would wait for each other
    arguments = "train", write(tmp_path, values), "-q", "parallel.max_restarts=0"
    done = forked_ranks.launch(tmp_path, *arguments, change=fail_before_the_ranks_meet, given=(kind,))
    assert done.code == code, done
    assert done.trouble.startswith(says), done
    assert kind == "bug" or done.trouble.count("\n") == 1, done
    assert not (tmp_path / "out").exists()


def hang(values: dict[str, Any]) -> None:
    """Train, but let the second rank fall asleep after its first step, for which the first one waits a second."""
    import torch.distributed as dist

    def act() -> None:
        if dist.get_rank() == 1:
            time.sleep(LONG)
        limit_waiting(timedelta(seconds=1))

    at_step(1, act)
    job.run(recipe.parse(values), progress=False, notify=lambda _: None)


def test_a_rank_that_hangs_becomes_an_error_in_time(base: Path, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ranks.RankError) as error:
        ranks.run(2, hang, settings(base, data_file, tmp_path / "out"), timeout=LONG / 3)
    said = "LostRankError: rank 0 got no answer from another rank: rank 1 lives and does something else"
    assert said in error.value.failed[0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tpp": 2}, "parallel.tpp: unknown key. Did you mean 'tp', 'pp'?"),
        ({"tp_size": 2}, "parallel.tp_size: unknown key. Did you mean 'tp'?"),
        ({"tp": 0}, "parallel.tp: expected greater than or equal to 1, got 0"),
        ({"sp": True}, "sp divides the tokens over the tensor-parallel ranks, of which there is one: set tp"),
        ({"pp": 2, "fsdp": 2}, "pp and fsdp exclude each other"),
        (
            {"tp": 2, "sp": True, "engine": "transformers"},
            "transformers trains with neither sp nor pp (engine=transformers)",
        ),
        ({"pp": 2, "tp": 2, "ep": 2}, "transformers trains with neither sp nor pp (it cuts the experts)"),
        ({"ep": 2}, "ep=2 has to be a multiple of tp=1 and to divide fsdp × tp = 1"),
        ({"fsdp": 2, "ep": 2, "engine": "native"}, "lorica's own layers leave experts whole"),
        ({"dp": 3}, "2 rows do not divide over 3 data-parallel ranks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(section: dict[str, Any], message: str) -> None:
    values = runs.settings(Path("base"), Path("data"), Path("out")) | {"parallel": section}
    with pytest.raises(RecipeError) as error:
        recipe.parse(values)
    assert message in str(error.value)


def test_ranks_have_no_device_of_their_choice_from_the_recipe() -> None:
    values = runs.settings(Path("base"), Path("data"), Path("out")) | {"parallel": {"tp": 2}}
    values["training"]["device"] = "cuda:1"
    with pytest.raises(RecipeError, match="ranks choose their own"):
        recipe.parse(values)


def test_too_few_processes_are_refused() -> None:
    values = runs.settings(Path("base"), Path("data"), Path("out")) | {"parallel": {"tp": 2}}
    with pytest.raises(RecipeError, match="asks for 2 processes; this is one"):
        job.run(recipe.parse(values))
