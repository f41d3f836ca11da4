"""``lorica train`` with an initialisation that looks at data: from the recipe's own training set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import runs
from lorica.files.json import read_json_object
from lorica.train import evaluate, job, models, recipe, sources, state

INITS = ["eva", "corda", "lora_ga"]


def run(base: Path, data: Path, output: Path, init: str, **options: Any) -> job.Result:
    values = runs.settings(base, data, output, lora__init_lora_weights=init, data__calibration_batches=3)
    values["lora"]["r"] = 3
    return job.run(recipe.parse(values), progress=False, notify=lambda _: None, **options)


def held_out_loss(base: Path, data: Path, adapter: Path) -> float:
    """What an adapter is worth on the base model that everybody has."""
    section = recipe.parse(runs.settings(base, data, adapter)).data
    loaded = sources.load(section, runs.tokenizer(), 96, 0)
    model = models.load_adapted(models.load_base(str(base)), str(adapter))
    return evaluate.loss(model, loaded.held_out, pad_id=evaluate.pad_id(runs.tokenizer()))


@pytest.mark.parametrize("init", INITS)
def test_a_run_starts_where_the_base_model_is_and_leaves_an_adapter_for_it(
    base: Path, data_file: Path, tmp_path: Path, init: str
) -> None:
    result, plain = (run(base, data_file, tmp_path / name, name) for name in (init, "gaussian"))
    assert result.eval_loss_before == pytest.approx(plain.eval_loss_before, rel=1e-4)
    config = read_json_object(result.adapter / "adapter_config.json")
    if init == "eva":
        assert config["init_lora_weights"] == "eva"
        assert config["rank_pattern"]
    else:  # plain LoRA of twice the rank, which anybody can load
        assert config["init_lora_weights"] is True
        assert config["r"] == 6
    assert held_out_loss(base, data_file, result.adapter) == pytest.approx(result.eval_loss_after, rel=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_a_run_that_stopped_goes_on_to_the_same_adapter(base: Path, data_file: Path, tmp_path: Path, init: str) -> None:
    whole, parts = (run(base, data_file, tmp_path / name, init) for name in ("whole", "parts"))
    for newest in state.complete(tmp_path / "parts")[1:]:
        shutil.rmtree(newest)
    again = run(base, data_file, tmp_path / "parts", init, resume=True)
    assert again.steps == whole.steps
    wanted, found = (load_file(result.adapter / "adapter_model.safetensors") for result in (whole, parts))
    assert found.keys() == wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())
