"""Kills, signals and errors of the disk at every change that writing a checkpoint makes to the file system leave the
checkpoint before, or the new one, whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and file-size limits")
def test_faults_at_every_write_step_of_a_checkpoint(base: Path, data_file: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, str(here / "killing.py"), str(base), str(data_file), str(tmp_path / "out")]
    paths = [str(here.parent), str(here.parent / "crashes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: (int(before), int(new)) for name, before, new in map(str.split, done.stdout.splitlines())}
    assert found.keys() == {
        *("kills", "kills_within_a_write", "errors", "errors_within_a_write", "one_signal", "two_signals")
    }
    for name in ("kills", "errors", "two_signals"):
        before, new = found[name]
        assert before > 25, name  # so many changes come before the new checkpoint has its name
        assert new > 5, name  # and so many after: the one before is deleted
    assert found["one_signal"][0] == 0
    assert found["one_signal"][1] == sum(found["kills"])
    assert all(found[name][0] > 3 for name in ("kills_within_a_write", "errors_within_a_write"))
