"""Kills, signals and errors of the disk at every change that writing a checkpoint makes to the file system leave the
checkpoint before, or the new one, whole."""

from __future__ import annotations

import os
from pathlib import Path

import killing
import pytest
import ranks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and file-size limits")
def test_faults_at_every_write_step_of_a_checkpoint(base: Path, data_file: Path, tmp_path: Path) -> None:
    (found,) = ranks.run(1, killing.rehearse, base, data_file, tmp_path / "out", timeout=900)
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
