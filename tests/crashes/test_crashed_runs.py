"""Whole training runs that are hit, and go on to be the run that was not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from typer.testing import CliRunner
from whole_runs import run, trace

from lorica.checkpoint.shards import ShardWriter
from lorica.cli.app import app
from lorica.errors import CheckpointError, RecipeError
from lorica.train import claim, job, metrics, state
from lorica.train.loop import DivergedError, Trainer
from lorica.train.signals import Interrupted

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FULL = faults.error(errno.ENOSPC)


def newest(values: dict[str, Any]) -> str:
    return state.complete(Path(values["output_dir"]))[-1].name


# ---- errors of the disk ----------------------------------------------------------------------------------------------


class Disk:
    """Of checkpoints: full from some change on that the second checkpoint makes to the file system, until cured."""

    def __init__(self, output: Path, patched: pytest.MonkeyPatch) -> None:
        self._place, self._patched, self._fault = state.directory_of(output), patched, contextlib.ExitStack()

    def fills(self, change: int) -> None:
        original, saves = state.Saver.save, []

        def save(saver: state.Saver) -> Path:
            saves.append(saver)
            if len(saves) == 2:
                saver.wait()  # or the first one is still being written
                self._fault.enter_context(faults.at(self._place, change, FULL, lasting=True))
            return original(saver)

        self._patched.setattr(state.Saver, "save", save)

    def cure(self) -> None:
        self._fault.close()
        self._patched.undo()


@pytest.fixture
def disk(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    found = Disk(Path(values["output_dir"]), monkeypatch)
    yield found
    found.cure()


@pytest.mark.parametrize(("asynchronous", "change"), [(False, 5), (True, 5), (True, 30)])
def test_a_full_disk_ends_the_run_with_what_is_left(
    asynchronous: bool, change: int, values: dict[str, Any], whole: dict[str, Any], disk: Disk
) -> None:
    values["checkpoint"]["asynchronous"] = asynchronous
    disk.fills(change)
    with pytest.raises(state.UnsavedError) as error:
        run(values)
    said = str(error.value)
    assert "checkpoints/step-000004 could not be written: /" in said
    assert "No space left on device. The newest complete one is step-000002" in said
    disk.cure()
    assert newest(values) == "step-000002"
    run(values, resume=True)
    assert trace(Path(values["output_dir"])) == whole


def test_the_command_says_so_and_leaves_with_an_exit_code(values: dict[str, Any], disk: Disk) -> None:
    disk.fills(5)
    file = Path(values["output_dir"]).with_suffix(".yaml")
    file.write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["train", str(file), "-q"])
    disk.cure()
    assert done.exit_code == 1, done.output
    assert done.stderr.count("error: the checkpoint ") == 1
    assert "Traceback" not in done.output


def test_the_error_of_a_checkpoint_in_the_background_is_told_besides_the_one_that_ended_the_run(
    values: dict[str, Any], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["checkpoint"]["asynchronous"] = True
    disk.fills(30)
    original, told = Trainer.step, []

    def step(self: Trainer) -> Any:
        if self.live.progress.step == 4:
            raise DivergedError("diverged")
        return original(self)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(DivergedError, match="diverged"):
        run(values, told.append)
    assert sum("step-000004 could not be written" in said for said in told) == 1
    assert newest(values) == "step-000002"


def test_a_checkpoint_that_overtakes_the_one_in_the_background_waits_for_it(
    values: dict[str, Any], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["checkpoint"]["asynchronous"] = True
    save, write, begun, written = state.Saver.save, ShardWriter.write_data, [threading.Event()], []
    overtook = []

    def saves(saver: state.Saver) -> Path:
        begun[-1].set()
        begun.append(threading.Event())
        overtook.append(len(begun) - 2 - len(written))
        return save(saver)

    def writes(writer: ShardWriter, *arguments: Any) -> Any:
        if len(begun) < 4:  # there is another one to come
            assert begun[-1].wait(60)
        written.append(writer)
        return write(writer, *arguments)

    monkeypatch.setattr(state.Saver, "save", saves)
    monkeypatch.setattr(ShardWriter, "write_data", writes)
    run(values)
    assert overtook == [0, 1, 1]
    assert trace(Path(values["output_dir"])) == whole


def test_a_signal_waits_for_the_checkpoint_in_the_background(
    values: dict[str, Any], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["checkpoint"]["asynchronous"] = True
    original = Trainer.step

    def step(self: Trainer) -> Any:
        if self.live.progress.step == 4:  # of which the checkpoint may still be being written
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        with pytest.raises(Interrupted) as stopped:
            run(values)
    assert (stopped.value.exit_code, stopped.value.checkpoint.name) == (143, "step-000005")
    assert [path.name for path in state.complete(Path(values["output_dir"]))] == ["step-000004", "step-000005"]
    run(values, resume=True)
    found = trace(Path(values["output_dir"]))
    assert found.pop("step-000005")
    assert found.pop("step-000005 shards")
    assert found == {key: value for key, value in whole.items() if not key.startswith("step-000004")}


def test_an_adapter_that_cannot_be_written_at_the_end_is_written_by_the_next_run(
    values: dict[str, Any], whole: dict[str, Any]
) -> None:
    output = Path(values["output_dir"])
    full = pytest.raises(OSError, match=f"No space left on device: '{output / 'adapter'}")
    with faults.at(output / "adapter", 3, FULL, lasting=True), full:
        run(values)
    assert newest(values) == "step-000006"
    run(values, resume=True)
    found = trace(output)
    assert found == whole
    assert not [name for name in os.listdir(output / "adapter") if name.startswith(".partial")]


class _FullFile:
    """Stands for an open file on a full disk."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        FULL("faults.fsync")

    def close(self) -> None:
        self._file.close()


def test_a_metric_that_cannot_be_written_ends_the_run_and_names_the_file(
    values: dict[str, Any], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = metrics.Metrics.write

    def write(self: metrics.Metrics, record: metrics.Record) -> None:
        if record["step"] == 3:
            self._file = _FullFile(self._file)  # type: ignore[assignment]
        original(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(metrics.Metrics, "write", write)
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
            run(values)
    run(values, resume=True)
    assert trace(Path(values["output_dir"])) == whole


def test_a_directory_that_cannot_be_written_is_told_before_training(values: dict[str, Any]) -> None:
    said = pytest.raises(RecipeError, match=f"output_dir: {values['output_dir']}.*: Read-only file system")
    with faults.at(Path(values["output_dir"]), 0, faults.error(errno.EROFS), lasting=True) as hit, said:
        run(values)
    assert len(hit) == 1
    assert not Path(values["output_dir"]).exists()


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_anywhere_goes_on_to_be_the_run_that_was_not(
    values: dict[str, Any], whole: dict[str, Any]
) -> None:
    output = Path(values["output_dir"])
    total = len(faults.changes(output, lambda: run(values)))
    assert total > 150
    for number in (1, 6, total // 3, total // 2, total - 30, total - 8):
        shutil.rmtree(output)
        assert faults.killed_at(output, number, lambda: run(values))
        run(values, resume=bool(job._present(output)))
        assert trace(output) == whole, number


def test_a_kill_while_another_run_is_removed_leaves_that_run_or_none_of_it(
    values: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    output, kept = Path(values["output_dir"]), tmp_path / "kept"
    run(values | {"training": values["training"] | {"seed": 5, "steps": 2}})
    output.rename(kept)
    refused = 0
    for number in range(1, 60, 7):
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(kept, output)
        assert faults.killed_at(output, number, lambda: run(values, overwrite=True))
        try:
            run(values, resume=bool(job._present(output)))
        except RecipeError as error:  # the other run is still there, whole
            assert "training.seed: was 5" in str(error)  # noqa: PT017 (a success is as good)
            state.check(state.complete(output)[-1])
            refused += 1
        else:
            assert trace(output) == whole, number
    assert 0 < refused < 9


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(
    values: dict[str, Any], whole: dict[str, Any]
) -> None:
    output = Path(values["output_dir"])
    run(values)
    checkpoint = state.complete(output)[-1]
    (checkpoint / "README.md").write_text("what its owner thinks of it")
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in state._EDITABLE):
        good = path.read_bytes()
        for bad in [None] if not good else [None, good[: len(good) // 2], _flipped(good)]:
            if path.name == "COMPLETE" and bad is None:
                continue  # then it is no complete checkpoint
            path.unlink() if bad is None else path.write_bytes(bad)
            with pytest.raises(CheckpointError) as error:
                run(values, resume=True)
            assert str(path) in str(error.value)
            assert f"To go on from step-000004, the one before, delete {checkpoint}" in str(error.value)
            path.write_bytes(good)
    run(values, resume=True)
    shards = checkpoint / "state" / "shards-00000.safetensors"
    shards.write_bytes(_flipped(shards.read_bytes()))
    done = CliRunner().invoke(app, ["consolidate", str(output), "-q"])
    assert (done.exit_code, f"error: {shards} is damaged" in done.stderr) == (2, True), done.output
    shutil.rmtree(checkpoint)
    run(values, resume=True)
    assert trace(output) == whole


def test_a_checkpoint_of_a_version_that_listed_no_files_is_gone_on_from(
    values: dict[str, Any], whole: dict[str, Any]
) -> None:
    output = Path(values["output_dir"])
    run(values)
    before, last = state.complete(output)
    shutil.rmtree(last)
    (before / "COMPLETE").write_bytes(b"")
    run(values, resume=True)
    assert trace(output) == whole


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# ---- two at once -----------------------------------------------------------------------------------------------------


@pytest.fixture
def other(values: dict[str, Any]) -> Iterator[int]:
    """Another process that has the directory of a finished run, and sleeps."""
    run(values)
    ready, told = os.pipe()

    def hold() -> None:
        claim.Claim(Path(values["output_dir"])).take()
        os.write(told, b"x")
        signal.pause()

    child = os.fork()
    if child == 0:
        try:
            hold()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    yield child
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_the_second_run_in_a_directory_is_refused(options: dict[str, Any], values: dict[str, Any], other: int) -> None:
    output = Path(values["output_dir"])
    before = {path: path.stat().st_mtime_ns for path in sorted(output.rglob("*"))}
    with pytest.raises(RecipeError, match=rf"output_dir: process {other} on .* is training into {output}"):
        run(values, **options)
    assert {path: path.stat().st_mtime_ns for path in sorted(output.rglob("*"))} == before


def test_the_claim_of_a_process_that_dies_is_nobodys(values: dict[str, Any], other: int, whole: dict[str, Any]) -> None:
    patient = claim.Claim(Path(values["output_dir"]), patience=60.0)  # as ranks that replace lost ones are
    threading.Timer(0.1, os.kill, (other, signal.SIGKILL)).start()
    with patient:
        patient.take()
    run(values, resume=True)
    assert trace(Path(values["output_dir"])) == whole


def test_a_run_that_another_was_faster_than_is_refused(
    values: dict[str, Any], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = job._prepare

    def prepare(*arguments: Any) -> Any:
        monkeypatch.undo()
        run(values)
        return original(*arguments)

    monkeypatch.setattr(job, "_prepare", prepare)
    with pytest.raises(RecipeError, match="another run was in"):
        run(values)
    assert trace(Path(values["output_dir"])) == whole


@pytest.mark.parametrize("system", ["with", "without"])
def test_where_the_disk_or_the_system_knows_no_locks_a_run_goes_without(
    system: str, values: dict[str, Any], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if system == "without":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setitem(sys.modules, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    run(values)
    assert trace(Path(values["output_dir"])) == whole
