"""Only regular files are opened, and only those that lie where they were looked for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lorica.errors import CheckpointError
from lorica.files.opening import open_regular, read_fully, refuse_links_out


def test_a_regular_file_is_read_as_far_as_it_goes(tmp_path: Path):
    (tmp_path / "it").write_bytes(b"12345")
    with open_regular(tmp_path / "it") as file:
        assert read_fully(file, 2) == b"12"
        assert read_fully(file, 9) == b"345"
        assert read_fully(file, 9) == b""


def test_nothing_else_is_opened_and_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        bound.bind("socket")
        for name in ("pipe", "folder", "socket", "loop", "nothing", "/dev/zero", "/dev/tty", "a\0b"):
            with pytest.raises(CheckpointError, match=r"not a regular file|cannot be read"):
                open_regular(tmp_path / name)


def test_a_pipe_that_takes_a_files_place_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "it").write_bytes(b"1")
    known = os.stat(tmp_path / "it")
    (tmp_path / "it").unlink()
    os.mkfifo(tmp_path / "it")
    monkeypatch.setattr("lorica.files.opening.os.stat", lambda _: known)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_regular(tmp_path / "it")


def test_links_are_followed_inside_only(tmp_path: Path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "it").write_bytes(b"1")
    (inside / "own").symlink_to("it")
    (inside / "out").symlink_to(outside / "it")
    (inside / "through").symlink_to("out")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "alias").symlink_to(inside)
    refuse_links_out(inside / "own", inside)
    refuse_links_out(tmp_path / "alias" / "own", tmp_path / "alias")
    for path in (inside / "out", inside / "through", inside / "folder" / "it", inside / ".." / "outside" / "it"):
        with pytest.raises(CheckpointError, match="leads out of"):
            refuse_links_out(path, inside)
    (inside / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be followed"):
        refuse_links_out(inside / "loop", inside)
