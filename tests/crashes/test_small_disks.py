"""Disks that are really too small, or read-only, in a copy of this process that has a view of its own on them."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from whole_runs import run, trace

from lorica import LoraConfig, get_peft_model
from lorica.errors import CheckpointError, RecipeError
from lorica.train import job, state

_NEW_MOUNTS, _PRIVATE, _REMOUNT, _READ_ONLY = 0x20000, 1 << 14 | 1 << 18, 32, 1


def mount(place: Path, flags: int, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def own_disk(place: Path, options: str) -> None:
    """Give this process, and no other one, a disk of its own at an empty directory."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    mount(Path("/"), _PRIVATE)
    mount(place, 0, options)


def _may_mount() -> bool:
    return sys.platform == "linux" and faults.in_child(lambda: _exits(lambda: own_disk(Path("/mnt"), "size=4k"))) == 0


def _exits(work: Callable[[], object]) -> None:
    try:
        work()
    except OSError:
        faults.kill("")


pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not _may_mount(), reason="needs the right to mount")


def stops(values: dict[str, Any], output: Path, expected: dict[str, Any], size: int) -> None:
    """Run on a disk of so many bytes, which is too small, then on a larger one."""
    own_disk(output, f"size={size}")
    try:
        run(values)
    except (state.UnsavedError, RecipeError, OSError) as error:
        assert "No space left on device" in str(error)  # noqa: PT017 (in a child, which has no pytest)
        assert str(output) in str(error)  # noqa: PT017
    else:
        raise AssertionError("that was enough")
    left = [entry.name for entry in output.rglob(".partial*")]
    assert not left, left
    for checkpoint in state.complete(output):
        state.check(checkpoint)
    mount(output, _REMOUNT, "size=64m")
    run(values, resume=bool(job._present(output)))
    assert trace(output) == expected


@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.9])
def test_a_run_on_a_disk_that_fills_stops_and_goes_on_on_a_larger_one(
    share: float, values: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    run(values)
    blocks = sum(entry.stat().st_blocks * 512 for entry in (tmp_path / "out").rglob("*"))
    small = tmp_path / "small"
    small.mkdir()
    values["output_dir"] = str(small)
    assert faults.in_child(lambda: stops(values, small, whole, int(blocks * share))) == 0


def test_on_a_read_only_disk_nothing_is_lost(values: dict[str, Any], whole: dict[str, Any], tmp_path: Path) -> None:
    def tries() -> None:
        own_disk(tmp_path, "size=64m")
        run(values)
        model = get_peft_model(job.models.load_base(values["model"]["path"]), LoraConfig(target_modules=["q_proj"]))
        mount(tmp_path, _REMOUNT | _READ_ONLY)
        for refused, work in (
            (RecipeError, lambda: run(values, resume=True)),
            (RecipeError, lambda: run(values, overwrite=True)),
            ((OSError, CheckpointError), lambda: model.save_pretrained(tmp_path / "out" / "adapter")),
        ):
            with pytest.raises(refused, match=f"{tmp_path / 'out'}") as error:
                work()
            assert "Read-only file system" in str(error.value)
        assert trace(tmp_path / "out") == whole

    assert faults.in_child(tries) == 0
