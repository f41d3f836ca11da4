"""``lorica bench``: the sides of a user's own model, counted and timed; nothing written for what is asked wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lorica.bench import contest, own, sides
from lorica.bench.contest import FROZEN, LORICA, PEFT
from lorica.cli.app import app
from lorica.train import models


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def figures(folder: Path) -> dict[tuple[str, str], dict]:
    data = json.loads((folder / "results.json").read_text())
    return {(row["measure"], row["quantity"]): row for row in data["figures"]}


needs_peft = pytest.mark.skipif(not sides.has_peft(), reason="PEFT is not installed: pip install 'lorica[bench]'")


@needs_peft
def test_everything_of_a_model_beside_peft(base: Path, tmp_path: Path) -> None:
    weights = {name: p.clone() for name, p in models.load_base(str(base)).named_parameters()}
    done = invoke(base, "--quick", "-q", "--r", 4, "--tokens", 16, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["RESULTS.md", "results.json", "results.png"]
    page = (tmp_path / "out" / "RESULTS.md").read_text()
    found = figures(tmp_path / "out")
    for name in own.KINDS:
        assert f"\n`{name}`: " in page
        assert set(found[name, "time"]["values"]) >= {PEFT, LORICA}
    assert "| peft |" in page
    assert f"`lorica bench {base} --r 4" in page
    assert "Training step" in done.stdout
    step = found["step", "bytes moved"]
    assert set(step["values"]) == {FROZEN, PEFT, LORICA}
    assert step["values"][FROZEN] < step["values"][LORICA] < step["values"][PEFT]
    assert found["step", "FLOPs"]["excess"] == pytest.approx(1.0)
    for name, p in models.load_base(str(base)).named_parameters():
        assert torch.equal(p, weights[name]), "the model's files stay as they are"


def test_without_peft_the_frozen_base_is_what_is_compared_with(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "has_peft", lambda: False)
    done = invoke(base, "--quick", "-q", "--only", "step,injection", "--tokens", 8, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "peft is not installed" in done.stderr
    found = figures(tmp_path / "out")
    assert set(found["step", "time"]["values"]) == {FROZEN, LORICA}
    assert found["step", "kernels"]["ratio"] > 1
    assert found["injection", "time"]["ratio"] is None
    assert "lorica / frozen base" in (tmp_path / "out" / "RESULTS.md").read_text()


def test_names_of_modules_and_dropout_reach_the_adapter(base: Path, tmp_path: Path) -> None:
    def kernels(*options: object) -> dict[str, float]:
        arguments = ("--quick", "-q", "--no-peft", "--only", "step", "--tokens", 8, "--out", tmp_path / "out")
        done = invoke(base, *arguments, *options)
        assert done.exit_code == 0, done.output
        return figures(tmp_path / "out")["step", "kernels"]["values"]

    whole, few = kernels(), kernels("--target-modules", "q_proj,v_proj")
    assert whole[FROZEN] == few[FROZEN] < few[LORICA] < whole[LORICA]
    assert kernels("--target-modules", "q_proj,v_proj", "--dropout", 0.1)[LORICA] > few[LORICA]


MISTAKES = [
    (["--only", "step,decod"], "Did you mean 'decode'?"),
    (["--r", "0"], "--r"),
    (["--dropout", "1.5"], "--dropout"),
    (["--dtype", "int4"], "--dtype: expected"),
    (["--device", "tpu9"], "There is no device 'tpu9'"),
    (["--tokens", "5000"], "more than the model's 96 positions"),
    (["--target-modules", "q_prj"], "q_proj"),
    (["--batches", "2"], "--batch"),
]


@pytest.mark.parametrize(("wrong", "says"), MISTAKES, ids=lambda value: str(value)[:40])
def test_what_is_asked_wrongly_is_said_and_nothing_written(
    base: Path, tmp_path: Path, wrong: list[str], says: str
) -> None:
    done = invoke(base, "--quick", "-q", "--tokens", 8, "--out", tmp_path / "out", *wrong)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_wrong(base: Path, tmp_path: Path) -> None:
    def refused(says: str, *arguments: object) -> None:
        done = invoke(*arguments)
        assert done.exit_code == 2, done.output
        assert says in done.stderr

    file = tmp_path / "file"
    file.write_text("mine")
    refused("is a file", base, "--out", file)
    refused("no directory", base, "--out", tmp_path / "no" / "out")
    refused("There is no model directory", "./nowhere", "--out", tmp_path / "out")
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_sides_that_differ_are_no_result(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(*_: object) -> None:
        raise contest.UnequalSidesError("step: peft and lorica differ by 1.0e+00, relatively")

    monkeypatch.setattr(contest, "_same_result", differ)
    done = invoke(base, "--quick", "-q", "--no-peft", "--only", "step", "--tokens", 8, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "differ by" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_twin_has_the_weights_and_not_the_modules() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    other = sides.twin(model)
    assert other[0] is not model[0]
    assert other[0].weight is model[0].weight
    assert other[1].running_mean is model[1].running_mean


def test_nothing_imports_peft_before_it_is_compared_with() -> None:
    code = "import sys, lorica.bench.own, lorica.cli.app; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
