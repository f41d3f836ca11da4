"""``lorica extract``: an adapter from two model directories, a table of errors, and nothing where it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lorica.cli.app import app
from lorica.train import models


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with every weight changed."""
    model = models.load_base(str(base))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("tuned")
    model.save_pretrained(folder)
    return folder


def test_the_adapter_merges_into_the_fine_tuned_model(base: Path, tuned: Path, tmp_path: Path):
    done = invoke("extract", base, tuned, "-o", tmp_path / "adapter", "--energy", "1.0", "--whole", "changed")
    assert done.exit_code == 0, done.output
    assert "q_proj.weight" in done.stdout
    assert "not in the adapter" not in done.stdout
    assert invoke("merge", tmp_path / "adapter", tmp_path / "merged", "-q").exit_code == 0
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", tuned))
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=2e-6), name
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )


def test_what_a_rank_leaves_is_said(base: Path, tuned: Path, tmp_path: Path):
    done = invoke("extract", base, tuned, "-o", tmp_path / "adapter", "--rank", "2", "--targets", "q_proj,v_proj", "-q")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    ranks = {entry["name"]: entry["rank"] for entry in report}
    assert {name.split(".")[-2] for name, rank in ranks.items() if rank} == {"q_proj", "v_proj"}
    assert all(0 < entry["explained"] < 1 for entry in report if entry["rank"])
    left = sum(not rank for rank in ranks.values())
    assert f"{left} of {len(ranks)} changes are not in the adapter" in done.stdout


def test_what_cannot_be_extracted_leaves_nothing(base: Path, tuned: Path, tmp_path: Path):
    def refused(says: str, *arguments: object) -> None:
        result = invoke("extract", *arguments)
        assert result.exit_code == 2, result.output
        assert says in result.stderr
        assert list(tmp_path.iterdir()) == []

    output = tmp_path / "adapter"
    refused("either a rank or the share", base, tuned, "-o", output)
    refused("already exists", base, tuned, "-o", base, "--rank", "2")
    refused("no directory", base, tuned, "-o", tmp_path / "no" / "adapter", "--rank", "2")
    refused("energy=2.0", base, tuned, "-o", output, "--energy", "2.0")
    refused("same weights", base, base, "-o", output, "--rank", "2")
    refused("There is no model directory", base, "./nowhere", "-o", output, "--rank", "2")
    refused("--dtype: expected", base, tuned, "-o", output, "--rank", "2", "--dtype", "int4")
