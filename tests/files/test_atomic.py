"""A file is the old one or the new one, and a directory is complete or does not count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorica.files import atomic


class StopHere(Exception):
    """Stands for a crash."""


def fail(*_: object) -> None:
    raise StopHere


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, operation):
    path = tmp_path / "facts.json"
    atomic.write_json(path, {"old": 1})
    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(StopHere):
        atomic.write_json(path, {"new": 2})
    monkeypatch.undo()
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]


def _write_both(first: Path, second: Path, *, fails: bool) -> None:
    with atomic.at_once():
        atomic.write_json(first, {"new": 2})
        atomic.write_json(second, {"new": 2})
        if fails:
            fail()


@pytest.mark.parametrize("operation", ["fsync", "replace", "the block"])
def test_of_files_written_at_once_none_is_new_if_one_fails(tmp_path, monkeypatch, operation):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for path in (first, second):
        atomic.write_json(path, {"old": 1})
    if operation != "the block":
        monkeypatch.setattr(os, operation, fail)
    with pytest.raises(StopHere):
        _write_both(first, second, fails=operation == "the block")
    monkeypatch.undo()
    for path in (first, second):
        assert path.read_text() == '{\n  "old": 1\n}\n'
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first.json", "second.json"]
    atomic.write_json(first, {"new": 2})
    assert "new" in first.read_text()


def test_files_written_at_once_are_flushed_before_the_first_is_renamed_and_renamed_in_their_order(
    tmp_path, monkeypatch
):
    done: list[str] = []
    sync, replace = atomic.sync, os.replace
    monkeypatch.setattr(atomic, "sync", lambda path: (sync(path), done.append("flush" if path.is_file() else "folder")))
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), done.append(os.path.basename(new))))
    with atomic.at_once():
        atomic.write_json(tmp_path / "b.json", 1)
        with atomic.at_once():
            atomic.write_json(tmp_path / "a.json", 2)
        assert not done
        assert not (tmp_path / "a.json").exists()
    assert done == ["flush", "flush", "b.json", "a.json", "folder"]


def test_tensors_come_back(tmp_path):
    path = tmp_path / "weights.safetensors"
    atomic.write_tensors(path, {"a": torch.arange(6.0).view(2, 3)}, {"format": "pt"})
    assert torch.equal(load_file(path)["a"], torch.arange(6.0).view(2, 3))


def test_a_directory_appears_whole_with_its_marker(tmp_path):
    final = tmp_path / "step"
    with atomic.complete_directory(final) as folder:
        (folder / "part").write_text("x")
        assert not final.exists()
    assert atomic.is_complete(final)
    assert (final / "part").read_text() == "x"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]


def test_a_directory_whose_filling_fails_does_not_appear(tmp_path):
    def fill() -> None:
        with atomic.complete_directory(tmp_path / "step") as folder:
            (folder / "part").write_text("x")
            raise StopHere

    with pytest.raises(StopHere):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_complete_directory_is_not_overwritten(tmp_path):
    with atomic.complete_directory(tmp_path / "step"):
        pass
    with pytest.raises(FileExistsError, match="never overwritten"), atomic.complete_directory(tmp_path / "step"):
        pass


def test_what_a_crash_left_is_removed(tmp_path):
    (tmp_path / ".partial-abc").mkdir()
    (tmp_path / ".partial-abc" / "x").write_text("x")
    (tmp_path / ".partial-def.json").write_text("{")
    (tmp_path / "kept").write_text("x")
    atomic.remove_partial(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
