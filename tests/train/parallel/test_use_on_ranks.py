"""Evaluation, generation and consolidation on many ranks say what one process says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import many
import pytest
import ranks

import runs
from lorica.checkpoint.shards import read_index
from lorica.train import state


def command(*arguments: str) -> str:
    """What a command prints on this rank."""
    from lorica.cli.app import app

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert not app(list(arguments), standalone_mode=False)
    return printed.getvalue()


@pytest.fixture(scope="module")
def trained(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    many.run(2, runs.settings(base, data_file, output, parallel={"tp": 2}))
    return output


@pytest.mark.parametrize("layout", ["tp=2,sp=true", "dp=2", "fsdp=2"])
def test_loss_and_answers_are_those_of_one_process(layout: str, data_file: Path, trained: Path) -> None:
    arguments = ["eval", str(trained / "adapter"), "--data", str(data_file), "--device", "cpu", "--json"]
    alone = json.loads(command(*arguments))
    for said in ranks.run(2, command, *arguments, "--parallel", layout):
        ours: dict[str, Any] = json.loads(said)
        assert ours.pop("loss") == pytest.approx(alone["loss"], rel=1e-5)
        assert ours.pop("perplexity") == pytest.approx(alone["perplexity"], rel=1e-4)
        assert ours == {key: alone[key] for key in ours}
    asked = ["generate", str(trained / "adapter"), "1 + 1 = ", "23 + 4 = ", "5", "--max-new-tokens", "6", "--json"]
    assert ranks.run(2, command, *asked, "--device", "cpu", "--parallel", layout) == [command(*asked)] * 2


def test_a_pipeline_measures_the_loss(data_file: Path, trained: Path) -> None:
    arguments = ["eval", str(trained / "adapter"), "--data", str(data_file), "--device", "cpu", "--json"]
    arguments += ["--no-exact-match"]
    alone = json.loads(command(*arguments))
    for said in ranks.run(2, command, *arguments, "--parallel", "pp=2"):
        assert json.loads(said)["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_what_a_pipeline_cannot_do_and_what_is_no_layout_is_refused(trained: Path, capsys: Any) -> None:
    from lorica.cli.app import app

    for layout, message in (("pp=2", "stages of a pipeline cannot generate"), ("tpp=2", "Did you mean 'tp', 'pp'?")):
        with pytest.raises(SystemExit) as left:
            app(["generate", str(trained / "adapter"), "1 + 1 = ", "--parallel", layout])
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_consolidate_makes_the_file_that_the_ranks_saved(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "adapter")
    last = state.complete(run)[-1]
    saved = (last / state.ADAPTER).read_bytes()
    (last / state.ADAPTER).unlink()
    assert len(list((last / "state").glob("*.safetensors"))) == 2
    command("consolidate", str(run), "-q")
    assert (run / "adapter" / state.ADAPTER).read_bytes() == saved == (trained / "adapter" / state.ADAPTER).read_bytes()
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    command("consolidate", str(last), "-q")
    assert (last / state.ADAPTER).read_bytes() == saved
    assert not [name for name in os.listdir(last) if name.startswith(".")]


@pytest.mark.parametrize(("count", "layout"), [(4, "tp=2,fsdp=2"), (1, "")])
def test_resharded_state_is_what_the_ranks_of_that_layout_write(
    count: int, layout: str, trained: Path, tmp_path: Path, base: Path, data_file: Path
) -> None:
    last = state.complete(trained)[-1]
    command("reshard", str(trained), str(tmp_path / "new"), "--parallel", layout, "-q")
    section = dict(pair.split("=") for pair in layout.split(",") if pair)
    values = runs.settings(base, data_file, tmp_path / "run", parallel={key: int(n) for key, n in section.items()})
    values["training"]["batch_size"] = 4
    many.run(count, values)  # other numbers, but in the same places
    theirs = read_index(state.complete(tmp_path / "run")[-1] / "state")
    ours = read_index(tmp_path / "new" / "state")
    for name in theirs:
        if not name.startswith("random/"):
            assert sorted(ours[name].shards) == sorted(theirs[name].shards) or len(theirs[name].shards) == 1, name
            assert ours[name][:2] == theirs[name][:2]
    (tmp_path / "new" / state.ADAPTER).unlink()
    command("consolidate", str(tmp_path / "new"), "-q")
    assert (tmp_path / "new" / state.ADAPTER).read_bytes() == (last / state.ADAPTER).read_bytes()


def test_an_adapter_becomes_sharded_state_and_a_file_again(trained: Path, tmp_path: Path, capsys: Any) -> None:
    command("reshard", str(trained / "adapter"), str(tmp_path / "new"), "--parallel", "tp=2,sp=true", "-q")
    assert len(list((tmp_path / "new" / "state").glob("*.safetensors"))) == 2
    command("consolidate", str(tmp_path / "new"), "-q", "-o", str(tmp_path / "back"))
    assert (tmp_path / "back" / state.ADAPTER).read_bytes() == (trained / "adapter" / state.ADAPTER).read_bytes()
    from lorica.cli.app import app

    with pytest.raises(SystemExit) as left:
        app(["reshard", str(trained), str(tmp_path / "other"), "--parallel", "tp=3", "-q"])
    assert left.value.code == 2
    assert "do not divide over 3 ranks" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
