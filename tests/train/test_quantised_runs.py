"""QLoRA from the command line: a run on a quantised base, and merging into a quantised checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import runs
from lorica import LoraConfig, PeftModel, get_peft_model
from lorica.cli.app import app
from lorica.errors import RecipeError
from lorica.storage import Packed, stored_weight
from lorica.train import job, metrics, models, recipe, state

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run(values: dict[str, Any], **options: Any) -> job.Result:
    return job.run(recipe.parse(values), progress=False, notify=lambda _: None, **options)


def projection(model: Any) -> Packed:
    stored = stored_weight(model.get_submodule("model.layers.0.mlp.up_proj"), "weight")
    assert isinstance(stored, Packed)
    return stored


def quantised(base: Path, directory: Path, kind: str = "nf4") -> Path:
    """The model as a checkpoint that is quantised already."""
    models.load_base(str(base), quantization=kind, where=torch.device("cpu")).save_pretrained(directory)
    runs.tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_run_on_a_quantised_base_learns(kind: str, base: Path, data_file: Path, tmp_path: Path) -> None:
    values = runs.settings(base, data_file, tmp_path / "run", model__quantization=kind, training__steps=12)
    values["training"]["gradient_checkpointing"] = True
    run(values)
    losses = [entry["loss"] for entry in metrics.read(tmp_path / "run" / "metrics.jsonl") if entry["kind"] == "eval"]
    assert losses[-1] < losses[0]
    # The file is one of any LoRA; it belongs to the base as it was quantised, and loads on a plain one.
    for again in ({}, {"quantization": kind}):
        model = models.load_base(str(base), where=torch.device("cpu"), **again)
        PeftModel.from_pretrained(model, str(tmp_path / "run" / "adapter"))


def test_the_base_of_a_run_is_quantised_as_asked(base: Path) -> None:
    model = models.load_base(str(base), quantization="nf4", dtype="bfloat16", where=torch.device("cpu"))
    assert projection(model).kind == "bitsandbytes nf4"
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert projection(models.load_base(str(base), quantization="int8", where=torch.device("cpu"))).kind.endswith("int8")


def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(base: Path, data_file: Path, tmp_path: Path) -> None:
    ends = []
    for name in ("whole", "resumed"):
        values = runs.settings(base, data_file, tmp_path / name, model__quantization="nf4")
        run(values)
        if name == "resumed":
            for checkpoint in state.complete(tmp_path / name)[1:]:
                (checkpoint / "COMPLETE").unlink()
            run(values, resume=True)
        ends.append(load_file(state.complete(tmp_path / name)[-1] / state.ADAPTER))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"fsdp": 2}, {"pp": 2}])
def test_a_quantised_base_is_not_cut(parallel: dict[str, int], base: Path, data_file: Path, tmp_path: Path) -> None:
    values = runs.settings(base, data_file, tmp_path, model__quantization="nf4", parallel=parallel)
    with pytest.raises(RecipeError, match=r"model\.quantization: nf4 weights cannot be cut over ranks"):
        recipe.parse(values)


def test_what_is_quantised_already_is_not_quantised_again(base: Path, tmp_path: Path) -> None:
    made = quantised(base, tmp_path / "base")
    with pytest.raises(RecipeError, match="is quantised already"):
        models.load_base(str(made), quantization="nf4")
    with pytest.raises(RecipeError, match=r"expected 'nf4', 'fp4' or 'int8'|quantization"):
        recipe.parse({"model": {"path": "x", "quantization": "int3"}, "data": {"train": "x"}})


def test_merging_into_a_quantised_checkpoint_says_what_it_cost_or_why_not(base: Path, tmp_path: Path) -> None:
    made = quantised(base, tmp_path / "base")
    loaded = models.load_base(str(made), where=torch.device("cpu"))
    assert projection(loaded).kind == "bitsandbytes nf4"
    adapted = get_peft_model(loaded, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    arguments = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--model", str(made), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert "the base model is quantised. So the whole model is loaded" in result.stderr
    assert "which were quantised anew" in result.stderr
    assert result.exit_code == 2
    assert "in a form that transformers reads and cannot write" in result.stderr
    assert not (tmp_path / "merged").exists()
