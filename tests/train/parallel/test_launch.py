"""The command starts its own ranks; what ends them, and how it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import many
import pytest
import ranks
import yaml

import runs
from lorica.cli import rank
from lorica.errors import RecipeError
from lorica.train import job, recipe, state

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = runs.settings(base, data, output, lora__lora_dropout=0.1, **changes)
    values["training"] |= {"eval_every": None, "steps": 40}
    values["log"] = {"every": 1}
    values["parallel"] = {"dp": 2}
    return values


def start(*arguments: str, torchrun: bool = False) -> subprocess.Popen[str]:
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *runner, "-m", "lorica", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def uninterrupted(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return many.run(2, settings(base, data_file, tmp_path_factory.mktemp("whole") / "out"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_is_replaced_and_the_run_goes_on_bit_for_bit(
    base: Path, data_file: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings(base, data_file, tmp_path / "cut")))
    process = start("train", str(file), "-q", "parallel.max_restarts=1")
    wait_for(tmp_path / "cut" / "checkpoints" / "step-000003", process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    said, trouble = process.communicate(timeout=300)
    assert process.returncode == 0, trouble
    assert trouble.count("Resuming after step") == 1, trouble
    assert said.count("adapter") == 2, said  # one line with one path
    assert many.records(tmp_path / "cut") == uninterrupted


def test_a_signal_reaches_the_ranks_which_save_and_another_layout_goes_on(
    base: Path, data_file: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    values = settings(base, data_file, tmp_path / "cut")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    process = start("train", str(file), "-q")
    wait_for(tmp_path / "cut" / "checkpoints" / "step-000003", process)
    process.send_signal(signal.SIGTERM)
    said, trouble = process.communicate(timeout=300)
    assert process.returncode == 143, trouble
    assert said == ""
    assert trouble.count("Stopped by SIGTERM after step") == 1, trouble
    assert trouble.count(f"Continue with: lorica train {file} --resume") == 1, trouble
    assert "error" not in trouble
    step = int(state.complete(tmp_path / "cut")[-1].name.removeprefix("step-"))
    assert many.records(tmp_path / "cut")[-1]["step"] == step
    assert many.run(2, values, resume=True) == uninterrupted


def test_torchrun_runs_the_command_as_it_is(base: Path, data_file: Path, tmp_path: Path) -> None:
    values = settings(base, data_file, tmp_path / "out")
    values["training"]["steps"] = 2
    values["parallel"] = {}  # the ranks that are there are replicas
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    process = start("train", str(file), "-q", torchrun=True)
    said, trouble = process.communicate(timeout=300)
    assert process.returncode == 0, trouble
    assert said.count("adapter") == 2, said
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
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings(base, data_file, tmp_path / "out") | {"parallel": {"tp": 3}}))
    process = start("train", str(file), "-q", "parallel.max_restarts=0")
    said, trouble = process.communicate(timeout=300)
    assert (process.returncode, said) == (2, ""), trouble
    assert trouble.count("do not divide over 3 ranks") == 1, trouble
    assert trouble.startswith("error: parallel: model.layers.0.self_attn"), trouble
    assert not (tmp_path / "out").exists()


def hang(values: dict[str, Any]) -> None:
    """Train, but let the second rank fall asleep after its first step."""
    import torch.distributed as dist

    from lorica.train.loop import Trainer

    original = Trainer.step

    def step(self: Trainer) -> Any:
        if dist.get_rank() == 1 and self.live.progress.step:
            time.sleep(20)
        return original(self)

    Trainer.step = step  # type: ignore[method-assign]
    job.run(recipe.parse(values), progress=False, notify=lambda _: None)


def test_a_rank_that_hangs_becomes_an_error_in_time(base: Path, data_file: Path, tmp_path: Path) -> None:
    values = settings(base, data_file, tmp_path / "out")
    values["parallel"]["timeout"] = 2.0
    started = time.monotonic()
    with pytest.raises(ranks.RankError) as error:
        ranks.run(2, hang, values, timeout=60)
    said = "LostRankError: rank 0 got no answer from another rank: rank 1 lives and does something else"
    assert said in error.value.failed[0]
    assert time.monotonic() - started < 30


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
