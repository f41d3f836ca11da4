"""A recipe says all that is wrong with it, and suggests what would be right."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from lorica import LoraConfig
from lorica.errors import RecipeError
from lorica.train import recipe

NEEDED = ["model.path=base", "data.train=rows.jsonl"]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lora.rank=8", "lora.rank: unknown key. Did you mean 'r'?"),
        ("training.learning_rat=1", "Did you mean 'learning_rate'"),
        ("trainin.seed=1", "Did you mean 'training'?"),
        ("batch_size=3", "Did you mean 'training.batch_size'?"),
        ("training.schedule=cos", "expected 'cosine', 'linear' or 'constant', got 'cos'"),
        ("lora.r=none", "lora.r: expected a valid integer"),
        ("training.learning_rate=0", "training.learning_rate: expected greater than 0"),
        ("model.trust_remote_code=true", "model.trust_remote_code: expected False"),
        ("lora.r.x=1", "lora.r: expected a valid integer"),
        ("output_dir.x=1", "output_dir"),
        ("=3", "write section.key=value"),
        ("training.seed=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_named_with_a_suggestion(override: str, hint: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe.load(None, [*NEEDED, override])
    assert hint in str(error.value)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        recipe.load(None, ["lora.rank=8", "training.seed=-1"])
    for part in ("model: missing", "data: missing", "lora.rank", "training.seed"):
        assert part in str(error.value)


def test_overrides_go_before_the_file_and_are_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {path: m}\ndata: {train: d}\nlora: {r: 2}\ntraining:\n")
    loaded = recipe.load(file, ["lora.r=16", "lora.target_modules=[q_proj, v_proj]", "training.learning_rate=1e-4"])
    assert (loaded.lora.r, loaded.lora.target_modules) == (16, ["q_proj", "v_proj"])
    assert loaded.training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "hint"), [("- a", "a recipe is a mapping"), ("a: [", "is not YAML"), ("{a: 1}", "recipe.yaml: ")]
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, hint: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        recipe.load(tmp_path / "recipe.yaml")
    assert hint in str(error.value)
    with pytest.raises(RecipeError, match=r"Did you mean .*recipe\.yaml"):
        recipe.load(tmp_path / "recpie.yaml")


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    loaded = recipe.load(None, [*NEEDED, "training.warmup_steps=3", "lora.rank_pattern={q_proj: 2}"])
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.dump_yaml(loaded), encoding="utf-8")
    assert recipe.load(file) == loaded


def test_every_lora_setting_is_a_field_of_the_config() -> None:
    theirs = {field.name for field in fields(LoraConfig)}
    # What the run itself fills in, what says how a file came to be, what needs other adapters, and what is not there.
    not_chosen = {"task_type", "peft_type", "inference_mode", "runtime_config", "base_model_name_or_path", "revision"}
    not_chosen |= {"auto_mapping", "peft_version", "arrow_config", "megatron_config", "megatron_core"}
    assert set(recipe.LoraSection.model_fields) == theirs - not_chosen


def test_the_schema_knows_every_key_and_forbids_others() -> None:
    schema = recipe.Recipe.model_json_schema()
    assert set(schema["properties"]) == set(recipe.Recipe.model_fields)
    assert all(section["additionalProperties"] is False for section in (schema, *schema["$defs"].values()))
    assert schema["$defs"]["TrainingSection"]["properties"]["loraplus_lr_ratio"]["description"].startswith("LoRA+")
