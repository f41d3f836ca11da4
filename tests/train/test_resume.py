"""A run that was stopped and resumed is the run that was not, to the last bit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import runs
from lorica.errors import CheckpointError, RecipeError
from lorica.train import job, metrics, recipe, signals, state, tensors

SHARDS = "state/shards-00000.safetensors"
SPEEDS = ("seconds", "tokens_per_second")


def run(values: dict[str, Any], **options: Any) -> job.Result:
    return job.run(recipe.parse(values), progress=False, notify=lambda _: None, **options)


def trace(output: Path) -> list[dict[str, Any]]:
    records = metrics.read(output / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in SPEEDS} for record in records]


def assert_same_run(first: Path, second: Path) -> None:
    assert trace(first) == trace(second)
    ends = [state.complete(output)[-1] for output in (first, second)]
    assert ends[0].name == ends[1].name
    for name in (state.ADAPTER, SHARDS):
        ours, theirs = (load_file(end / name) for end in ends)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
    numbers = [state.read_numbers(end) for end in ends]
    for entry in ("step", "batches", "random", "data"):
        assert numbers[0][entry] == numbers[1][entry], entry
    final = [(output / "adapter" / state.ADAPTER).read_bytes() for output in (first, second)]
    assert final[0] == final[1]


def run_and_stop(values: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch) -> signals.Interrupted:
    with monkeypatch.context() as patched:
        stop_after(count, patched)
        with pytest.raises(signals.Interrupted) as stopped:
            run(values)
    return stopped.value


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run be asked to stop, as by SIGTERM, at the ``count``-th time it looks."""
    asked = 0

    def call(self: signals.StopRequest) -> bool:
        nonlocal asked
        asked += 1
        if asked == count:
            self.signum = 15
        return self.signum is not None

    monkeypatch.setattr(signals.StopRequest, "__call__", call)


@pytest.fixture(scope="module")
def uninterrupted(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    run(runs.settings(base, data_file, output))
    return output


@pytest.mark.parametrize("kept", [3, 6])
def test_from_any_checkpoint(kept: int, base: Path, data_file: Path, tmp_path: Path, uninterrupted: Path) -> None:
    values = runs.settings(base, data_file, tmp_path / "out")
    run(values)
    for checkpoint in state.complete(tmp_path / "out"):
        if checkpoint.name > f"step-{kept:06d}":
            (checkpoint / "COMPLETE").unlink()
    # A process of its own would start from other random states.
    torch.manual_seed(123)
    run(values, resume=True)
    assert_same_run(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize("count", [1, 2, 4, 9, 14, 25])
def test_from_a_signal_at_any_time(
    count: int, base: Path, data_file: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = runs.settings(base, data_file, tmp_path / "out")
    stopped = run_and_stop(values, count, monkeypatch)
    assert stopped.exit_code == 143
    assert state.complete(tmp_path / "out")[-1] == stopped.checkpoint
    run(values, resume=True)
    assert_same_run(tmp_path / "out", uninterrupted)


def test_with_packing_and_lora_plus_and_bf16(
    base: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"data__packing": True, "training__bf16": True, "training__loraplus_lr_ratio": 8.0, "lora__bias": "all"}
    outputs = [tmp_path / "one", tmp_path / "two"]
    run(runs.settings(base, data_file, outputs[0], **changes, data__max_length=48))
    values = runs.settings(base, data_file, outputs[1], **changes, data__max_length=48)
    run_and_stop(values, 12, monkeypatch)
    run(values, resume=True)
    assert_same_run(*outputs)


def test_every_random_state_comes_back() -> None:
    pieces = copy.deepcopy(tensors.random_states(0))
    numbers = json.loads(json.dumps(tensors.random_numbers()))

    def draw() -> tuple[float, float, float]:
        return random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))

    first = [draw() for _ in range(3)]
    tensors.put_random_states(pieces)
    tensors.put_random_numbers(numbers)
    assert [draw() for _ in range(3)] == first


def test_a_checkpoint_that_is_being_deleted_no_longer_counts(
    base: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = runs.settings(base, data_file, tmp_path / "out", training__steps=4, checkpoint={"every": 1, "keep": 9})
    run(values)
    monkeypatch.setattr(state.shutil, "rmtree", lambda path, **_: None)  # a kill in the middle of it
    state.prune(tmp_path / "out", 1)
    assert [path.name for path in state.complete(tmp_path / "out")] == ["step-000004"]


def test_a_finished_run_resumes_to_itself(base: Path, data_file: Path, tmp_path: Path, uninterrupted: Path) -> None:
    values = runs.settings(base, data_file, tmp_path / "out")
    run(values)
    run(values, resume=True)
    assert_same_run(tmp_path / "out", uninterrupted)


def test_only_json_and_safetensors_are_written(uninterrupted: Path) -> None:
    checkpoint = state.complete(uninterrupted)[-1]
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert names == {
        "COMPLETE",
        "README.md",
        "adapter_config.json",
        state.ADAPTER,
        "state.json",
        "state/index.json",
        SHARDS,
    }


def test_only_the_newest_are_kept(base: Path, data_file: Path, tmp_path: Path) -> None:
    values = runs.settings(base, data_file, tmp_path / "out", checkpoint={"every": 2, "keep": 2})
    run(values)
    assert [path.name for path in sorted((tmp_path / "out" / "checkpoints").iterdir())] == [
        "step-000006",
        "step-000008",
    ]


@pytest.fixture
def stopped(base: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a run that has stopped after its first step."""
    values = runs.settings(base, data_file, tmp_path / "out")
    run_and_stop(values, 10, monkeypatch)
    return values


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("training", "steps", 9), ("lora", "r", 8), ("training", "seed", 1), ("data", "packing", True)],
)
def test_a_changed_recipe_is_refused_and_the_key_named(
    stopped: dict[str, Any], section: str, key: str, value: Any
) -> None:
    before = sorted(Path(stopped["output_dir"]).rglob("*"))
    was = stopped[section].get(key, recipe.parse(stopped).model_dump()[section][key])
    stopped[section][key] = value
    with pytest.raises(RecipeError) as error:
        run(stopped, resume=True)
    assert f"{section}.{key}: was {was!r}, is {value!r}" in str(error.value)
    assert sorted(Path(stopped["output_dir"]).rglob("*")) == before


def test_harmless_changes_are_taken(stopped: dict[str, Any], uninterrupted: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    Path(stopped["output_dir"]).rename(moved)
    rows = tmp_path / "same rows.jsonl"
    rows.write_bytes(Path(stopped["data"]["train"]).read_bytes())
    stopped |= {"output_dir": str(moved), "checkpoint": {"every": 4, "keep": 1}}
    stopped["data"]["train"] = str(rows)
    run(stopped, resume=True)
    assert (moved / "adapter" / state.ADAPTER).read_bytes() == (uninterrupted / "adapter" / state.ADAPTER).read_bytes()
    assert trace(moved) == trace(uninterrupted)


def test_other_data_under_the_same_recipe_are_refused(stopped: dict[str, Any], tmp_path: Path) -> None:
    stopped["data"]["train"] = str(runs.write_jsonl(tmp_path / "other.jsonl", runs.sums(30, seed=9)))
    with pytest.raises(CheckpointError, match="other data"):
        run(stopped, resume=True)


def _drop(key: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))

    return damage


def _drop_tensor(path: Path) -> None:
    values = json.loads(path.read_text())
    values["tensors"].pop(next(name for name in values["tensors"] if name.startswith("factors/")))
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", lambda path: path.write_text("{")),
        ("state.json", _drop("progress")),
        ("state/index.json", lambda path: path.write_text("{}")),
        ("state/index.json", lambda path: path.unlink()),
        ("state/index.json", _drop_tensor),
        ("state.json", _drop("random")),
        (SHARDS, lambda path: path.write_bytes(path.read_bytes()[:100])),
        (SHARDS, lambda path: path.write_bytes(b"")),
        (SHARDS, lambda path: path.unlink()),
    ],
)
def test_a_damaged_checkpoint_is_named(stopped: dict[str, Any], name: str, damage: Callable[[Path], None]) -> None:
    damage(state.complete(Path(stopped["output_dir"]))[-1] / name)
    with pytest.raises(CheckpointError, match="step-"):
        run(stopped, resume=True)


def test_what_is_there_is_never_overwritten_unasked(stopped: dict[str, Any]) -> None:
    output = Path(stopped["output_dir"])
    (output / "notes.txt").write_text("mine")
    before = sorted(output.rglob("*"))
    with pytest.raises(RecipeError, match=r"--resume.*--overwrite"):
        run(stopped)
    with pytest.raises(RecipeError, match="one of them"):
        run(stopped, resume=True, overwrite=True)
    assert sorted(output.rglob("*")) == before
    run(stopped, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"


def test_resume_without_a_run_or_without_a_checkpoint(stopped: dict[str, Any], uninterrupted: Path) -> None:
    output = Path(stopped["output_dir"])
    for checkpoint in state.complete(output):
        (checkpoint / "COMPLETE").unlink()
    told: list[str] = []
    job.run(recipe.parse(stopped), resume=True, progress=False, notify=told.append)
    assert "starting from the beginning" in told[0]
    assert_same_run(output, uninterrupted)
    stopped["output_dir"] += "-other"
    with pytest.raises(RecipeError, match="there is no run in"):
        run(stopped, resume=True)
    assert not Path(stopped["output_dir"]).exists()
