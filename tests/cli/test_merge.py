"""``lorica merge``: streams where it can, says so where it has to load, writes nothing where it may not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lorica import LoraConfig, get_peft_model
from lorica.cli.app import app
from lorica.train import models


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter that does something."""
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(models.load_base(str(base)), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_base_without_safetensors_is_loaded(base: Path, adapter: Path, tmp_path: Path):
    streamed = invoke("merge", adapter, tmp_path / "streamed")
    assert streamed.exit_code == 0, streamed.output
    assert "loaded" not in streamed.stderr
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    loaded = invoke("merge", adapter, tmp_path / "loaded", "--model", pickled)
    assert loaded.exit_code == 0, loaded.output
    assert (
        "has neither model.safetensors.index.json nor model.safetensors. So the whole model is loaded" in loaded.stderr
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "loaded"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_dtype_may_be_asked_for(adapter: Path, tmp_path: Path):
    assert invoke("merge", adapter, tmp_path / "merged", "--dtype", "bfloat16", "-q").exit_code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_merged_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(says: str, *arguments: object) -> None:
        result = invoke("merge", adapter, *arguments)
        assert result.exit_code == 2, result.output
        assert says in result.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"adapter"}

    refused("already exists", adapter)
    refused("no directory", tmp_path / "no" / "merged")
    refused("--dtype: expected", tmp_path / "merged", "--dtype", "int8")
    refused("There is no model directory", tmp_path / "merged", "--model", "./nowhere")
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused("not a readable safetensors file", tmp_path / "merged")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused("--shard-ranks", tmp_path / "merged")
