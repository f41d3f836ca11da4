"""``lorica export``: one line for what was written, notes on stderr, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

from lorica import LoraConfig, get_peft_model
from lorica.cli.app import app
from lorica.train import models


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save(base: Path, directory: Path, **fields: object) -> Path:
    config = LoraConfig(init_lora_weights=False, **{"target_modules": ["q_proj"], "r": 24} | fields)
    get_peft_model(models.load_base(str(base)), config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang"])
def test_export(base: Path, tmp_path: Path, target: str):
    adapter = save(base, tmp_path / "adapter")
    result = invoke("export", adapter, "-o", tmp_path / "out", "--target", target)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["exported", str(tmp_path / "out")]
    needed = {"peft": "", "vllm": "--max-lora-rank 32", "sglang": "--lora-target-modules with: k_proj q_proj v_proj"}
    assert needed[target] in result.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 24
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert len(file.keys()) % (6 if target == "sglang" else 2) == 0


def test_what_cannot_be_exported_leaves_nothing(base: Path, tmp_path: Path):
    adapter = save(base, tmp_path / "adapter", use_dora=True)

    def refused(says: str, *arguments: object) -> None:
        result = invoke("export", *arguments)
        assert result.exit_code == 2, result.output
        assert says in " ".join(result.stderr.split())
        assert {path.name for path in tmp_path.iterdir()} == {"adapter"}

    refused("use_dora=True: vLLM has no DoRA", adapter, "-o", tmp_path / "out", "--target", "vllm")
    refused("no export to 'vlm'", adapter, "-o", tmp_path / "out", "--target", "vlm")
    refused("already exists", adapter, "-o", adapter, "--target", "peft")
    refused("no directory", adapter, "-o", tmp_path / "no" / "out", "--target", "peft")
    refused("adapter_config.json", tmp_path, "-o", tmp_path / "out", "--target", "peft")
