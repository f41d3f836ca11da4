"""A wrong key, path, type or column: one readable error with a suggestion, exit code 2, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import runs
from lorica.cli.app import app


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def there(base: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `model`, `rows.jsonl` and a recipe that would work."""
    (tmp_path / "model").symlink_to(base)
    (tmp_path / "rows.jsonl").symlink_to(data_file)
    values = runs.settings(Path("model"), Path("rows.jsonl"), Path("out"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = [
    (["lora.rank=8"], "Did you mean 'r'?"),
    (["training.batchsize=8"], "Did you mean 'batch_size'"),
    (["training.batch_size=many"], "training.batch_size: expected a valid integer"),
    (["model.path=./modle"], "Did you mean 'model'?"),
    (["model.path=rows.jsonl"], "rows.jsonl"),
    (["data.train=rows.json"], "Did you mean 'rows.jsonl'?"),
    (["data.train=model"], "is a directory"),
    (["data.train=recipe.yaml"], "data files end in"),
    (["data.split=test"], "rows.jsonl"),
    (["data.columns={prompt: promt}"], "Did you mean 'prompt'?"),
    (["data.format=messages"], "needs a column 'messages'"),
    (["data.max_length=5000"], "more than the model's 96 positions"),
    (["data.max_length=3"], "has anything to learn"),
    (["lora.target_modules=[q_prj]"], "q_proj"),
    (["lora.init_lora_weights=loftq"], "loftq"),
    (["lora.init_lora_weights=gausian"], "gaussian"),
    (["lora.bias=some"], "lora.bias"),
    (["training.device=tpu9"], "device"),
    (["log.wandb=true"], "pip install 'lorica[wandb]'"),
    (["output_dir=recipe.yaml"], "is a file"),
    (["output_dir=rows.jsonl/out"], "rows.jsonl"),
    (["--resume"], "there is no run in out"),
    (["--resume", "--overwrite"], "one of them"),
    (["nonsense"], "write section.key=value"),
    (["--reusme"], "--resume"),
]


@pytest.mark.parametrize(("arguments", "hint"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_readable_error_and_writes_nothing(
    arguments: list[str], hint: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = sorted(there.rglob("*"))
    result = invoke("train", "recipe.yaml", *arguments)
    assert result.exit_code == 2, result.output
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(there.rglob("*")) == before


def test_a_missing_recipe_is_suggested(there: Path) -> None:
    result = invoke("train", "recipes.yaml")
    assert (result.exit_code, "Did you mean 'recipe.yaml'?" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["generate", "model"], "nothing to continue"),
        (["generate", "./modle", "x"], "Did you mean 'model'?"),
        (["generate", "model", "x", "--adapter", "modl"], "Did you mean 'model'?"),
        (["generate", "model", "x", "--adapter", "model"], "is not an adapter"),
        (["generate", "model", "--file", "rows.json"], "Did you mean 'rows.jsonl'?"),
        (["generate", "model", "x", "--dtype", "int8"], "--dtype"),
        (["eval", "model", "--data", "rows.json"], "Did you mean 'rows.jsonl'?"),
        (["eval", "model", "--data", "rows.jsonl", "--format", "text"], "needs a column 'text'"),
        (["eval", "model", "--data", "rows.jsonl", "--format", "txt"], "expected 'auto'"),
        (["eval", "model", "--data", "rows.jsonl", "--column", "prompt"], "role=name"),
        (["merge", "model", "merged"], "is not an adapter"),
        (["merge", "nowhere", "model"], "already exists"),
        (["merge", "nowhere", "no/where"], "There is no directory"),
        (["inspect", "model"], "is not an adapter"),
        (["validate", "recipe.yaml", "data.format=text"], "needs a column 'text'"),
        (["validate", "recipe.yaml", "model.path=./modle"], "Did you mean"),
        (["tran"], "No such command"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_the_other_commands_too(arguments: list[str], hint: str, there: Path) -> None:
    before = sorted(there.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert hint in result.stderr
    assert sorted(there.rglob("*")) == before


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import lorica.cli

    monkeypatch.setattr(lorica.cli, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit) as left:
        lorica.cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "lorica: the command line needs typer. Install it with: pip install 'lorica[train]'"
    ]


def test_the_console_script_prints_its_version() -> None:
    from lorica import __version__

    command = [sys.executable, "-c", "from lorica.cli import main; main()", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"lorica {__version__}"
