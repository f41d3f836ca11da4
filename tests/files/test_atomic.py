"""A file is the old one or the new one, and a directory is complete or does not count."""

from __future__ import annotations

import os

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
