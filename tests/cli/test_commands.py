"""What the commands do when they are asked rightly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import lorica
import runs
from lorica.cli import inspect
from lorica.cli.app import app
from lorica.train import models


def stdout(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def trained(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a short run by the command line."""
    directory = tmp_path_factory.mktemp("trained")
    values = runs.settings(base, data_file, directory / "out", training__steps=20)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(values))
    said = stdout("train", directory / "recipe.yaml", "lora.rank_pattern={q_proj: 2}", "lora.use_rslora=true", "-q")
    assert "held-out loss" in said
    return directory / "out"


def test_train_writes_what_it_says(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {".lock", "adapter", "checkpoints", "loss.png", "metrics.jsonl", "recipe.yaml"}
    assert "base_model" in (trained / "adapter" / "README.md").read_text()


def test_the_resolved_recipe_is_valid(trained: Path) -> None:
    assert "is read as prompt_completion" in stdout("validate", trained / "recipe.yaml")


def test_the_schema_is_json_and_goes_to_a_file(tmp_path: Path) -> None:
    stdout("schema", "-o", tmp_path / "schema.json")
    assert json.loads((tmp_path / "schema.json").read_text()) == json.loads(stdout("schema"))


def test_generate_takes_prompts_and_files_and_an_adapter_that_knows_its_base(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    options = ["--max-new-tokens", 4, "--json"]
    (tmp_path / "prompts.txt").write_text("1 + 2 = \n3 + 4 = \n")
    lines = [
        json.loads(line)
        for line in stdout("generate", trained / "adapter", "-f", tmp_path / "prompts.txt", *options).splitlines()
    ]
    assert [line["prompt"] for line in lines] == ["1 + 2 = ", "3 + 4 = "]
    named = stdout("generate", base, "1 + 2 = ", "-a", trained / "adapter", *options)
    assert json.loads(named) == lines[0]
    assert json.loads(stdout("generate", base, "1 + 2 = ", *options)) != lines[0]
    assert stdout("generate", base, "hello", "--chat", "--temperature", 0.7, "--max-new-tokens", 4)


def test_eval_measures_loss_perplexity_and_matches(trained: Path, base: Path, data_file: Path) -> None:
    before = json.loads(stdout("eval", base, "-d", data_file, "--json"))
    after = json.loads(stdout("eval", base, "-a", trained / "adapter", "-d", data_file, "--json"))
    assert after["loss"] < before["loss"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert 0.0 <= after["exact_match"] <= 1.0
    assert after["rows"] == 30
    assert "perplexity" in stdout("eval", base, "-d", data_file, "--limit", 3, "--no-exact-match")


def test_the_merged_model_is_plain_and_answers_as_the_adapter_does(trained: Path, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stdout("merge", trained / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"COMPLETE", "adapter_config.json"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    adapted = models.load_adapted(models.load_base(str(base)), str(trained / "adapter"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "merged")("12 + 3 = ")["input_ids"]])
    with torch.no_grad():
        ours, theirs = plain(ids).logits, adapted(input_ids=ids).logits
        bare = models.load_base(str(base)).eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - bare).abs().max() > 1e-2


def test_the_numbers_of_inspect_are_those_of_the_dense_delta(trained: Path, tmp_path: Path) -> None:
    found = json.loads(stdout("inspect", trained / "adapter", "--json", "--plot", tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(found) == 14
    assert [entry["target"] for entry in found][:2] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
    ]
    adapted = models.load_adapted(
        models.load_base(
            json.loads((trained / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        ),
        str(trained / "adapter"),
    )
    for entry in found:
        layer = adapted.get_submodule(f"base_model.model.{entry['target']}")
        delta = layer.get_delta_weight("default").double()
        values = torch.linalg.svdvals(delta)[: entry["rank"]]
        assert entry["rank"] == (2 if entry["target"].endswith("q_proj") else 4)
        assert entry["scale"] == pytest.approx(8 / math.sqrt(entry["rank"]))
        assert entry["norm_delta"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert entry["singular_values"] == pytest.approx(values.tolist(), rel=1e-4)
        shares = values / values.sum()
        assert entry["effective_rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-4)
    assert "effective rank" in stdout("inspect", trained / "adapter")


@pytest.mark.parametrize("name", ["linear", "embedding", "conv"])
def test_inspect_reads_every_kind_of_layer(name: str, tmp_path: Path) -> None:
    layers = {
        "linear": torch.nn.Linear(6, 5),
        "embedding": torch.nn.Embedding(9, 5),
        "conv": torch.nn.Conv2d(4, 5, 3),
    }
    model = torch.nn.Sequential()
    model.add_module("target", layers[name])
    adapted: Any = lorica.get_peft_model(
        model, lorica.LoraConfig(r=2, target_modules=["target"], init_lora_weights=False)
    )
    adapted.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (entry,) = inspect.measure(tensors, json.loads((tmp_path / "adapter_config.json").read_text()))
    delta = adapted.get_submodule("base_model.model.target").get_delta_weight("default").detach()
    assert entry.norm_delta == pytest.approx(float(delta.norm()), rel=1e-5)


def test_a_zero_delta_has_no_effective_rank() -> None:
    tensors = {
        "base_model.model.x.lora_A.weight": torch.randn(2, 3),
        "base_model.model.x.lora_B.weight": torch.zeros(4, 2),
    }
    (entry,) = inspect.measure(tensors, {"lora_alpha": 2})
    assert (entry.effective_rank, entry.norm_delta) == (0.0, 0.0)
    del tensors["base_model.model.x.lora_B.weight"]
    with pytest.raises(lorica.errors.CheckpointError, match=r"not .*lora_B"):
        inspect.measure(tensors, {})
