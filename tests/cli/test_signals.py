"""A real process, a real signal: the state is saved, the exit code says why, --resume goes on as if never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import runs

COMMAND = [sys.executable, "-c", "from lorica.cli import main; main()", "train"]


def records(output: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in found]


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on_bit_for_bit(
    base: Path, data_file: Path, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(runs.settings(base, data_file, tmp_path / "whole", training__steps=40)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [*COMMAND, str(recipe), "-q", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole = start()
    stopped = start(f"output_dir={tmp_path / 'cut'}")
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "checkpoints" / "step-000003").is_dir():
        assert time.monotonic() < deadline
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.005)
    stopped.send_signal(sent)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == status, said
    assert f"Continue with: lorica train {recipe} output_dir={tmp_path / 'cut'} --resume" in said
    _, trouble = whole.communicate(timeout=120)
    assert whole.returncode == 0, trouble
    assert not (tmp_path / "cut" / "adapter").exists()

    resumed = start(f"output_dir={tmp_path / 'cut'}", "--resume")
    _, said = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    assert "Resuming after step" in said
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "state/shards-00000.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoints" / "step-000040" / name) for run in ("cut", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[key]) for key, value in ours.items())
