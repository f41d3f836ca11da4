"""SIGKILL at every operation of writing a checkpoint leaves the one before, or the new one, whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and file-size limits")
def test_a_kill_at_every_write_step_of_a_checkpoint(base: Path, data_file: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, str(here / "killing.py"), str(base), str(data_file), str(tmp_path / "out")]
    path = os.pathsep.join([str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    operations, whole_from = (int(word) for word in done.stdout.split() if word.isdigit())
    assert 20 < whole_from < operations
