"""A real process, a real signal: the state is saved, the exit code says why, --resume goes on as if never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import runs
from lorica.cli.app import app

#: The command, which gets a signal in its fifth step.
STOPPED = """
import signal, sys
from lorica.cli import main
from lorica.kernels import recorded
from lorica.train.loop import Trainer

recorded.ELEMENTS = 0  # as in conftest.py: the other way rounds otherwise
step, signum = Trainer.step, int(sys.argv.pop(1))

def stopped(self):
    if self.live.progress.step == 4:
        signal.raise_signal(signum)
    return step(self)

Trainer.step = stopped
main()
"""


def records(output: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in found]


def train(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments), "-q"])


def settings(base: Path, data: Path, output: Path) -> dict[str, Any]:
    return runs.settings(base, data, output, training__steps=9)


@pytest.fixture(scope="module")
def whole(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    recipe = output.with_name("recipe.yaml")
    recipe.write_text(yaml.safe_dump(settings(base, data_file, output)))
    done = train(recipe)
    assert done.exit_code == 0, done.output
    return output


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on_bit_for_bit(
    base: Path, data_file: Path, tmp_path: Path, whole: Path, sent: signal.Signals, status: int
) -> None:
    recipe, cut = tmp_path / "recipe.yaml", tmp_path / "cut"
    recipe.write_text(yaml.safe_dump(settings(base, data_file, cut)))
    command = [sys.executable, "-W", "ignore", "-c", STOPPED, str(int(sent)), "train", str(recipe), "-q"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    stopped = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert stopped.returncode == status, stopped.stderr
    assert f"Continue with: lorica train {recipe} --resume" in stopped.stderr
    assert (cut / "checkpoints" / "step-000005" / "COMPLETE").is_file()
    assert not (cut / "adapter").exists()

    resumed = train(recipe, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Resuming after step 5" in resumed.stderr
    assert records(cut) == records(whole)
    for name in ("adapter_model.safetensors", "state/shards-00000.safetensors"):
        ours, theirs = (load_file(output / "checkpoints" / "step-000009" / name) for output in (cut, whole))
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[key]) for key, value in ours.items())
