"""What the demonstration promises about the files it ships."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.train import recipe

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parents[2] / "demo"
BASE = DEMO / "base_model"
ROW = dict[str, str]


def read(name: str) -> list[ROW]:
    return [json.loads(line) for line in (DEMO / "data" / name).read_text(encoding="utf-8").splitlines()]


def record(row: ROW) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(row["completion"])
    return values


@pytest.fixture(scope="module")
def train_rows() -> list[ROW]:
    return read("train.jsonl")


@pytest.fixture(scope="module")
def test_rows() -> list[ROW]:
    return read("test.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def test_base_model_is_small() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 4_000_000


def test_base_model_has_grouped_heads_and_is_finite() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    assert model.config.model_type == "llama"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, 4)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tokenizer_gives_back_every_text(tokenizer: Any, test_rows: list[ROW]) -> None:
    texts = [row["prompt"] + row["completion"] for row in test_rows]
    texts += ["", " ", "\n\n  x\t", "Ünïcödé — 漢字 🎈", "1234567890", "a\u0000b", "(1 , 2 . 3 ) n't"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_has_its_special_tokens_and_a_chat_template(tokenizer: Any) -> None:
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special - {None}) == 3
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert text.endswith("good day" + tokenizer.eos_token)


def test_every_example_fits_the_context(tokenizer: Any, train_rows: list[ROW], test_rows: list[ROW]) -> None:
    settings = recipe.load(DEMO / "recipe.yaml")
    assert settings.data.max_length is not None
    texts = [row["prompt"] + row["completion"] for row in train_rows + test_rows]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert longest + 1 <= settings.data.max_length  # one more for the end of the text


def test_nothing_of_the_test_set_is_in_the_training_set(train_rows: list[ROW], test_rows: list[ROW]) -> None:
    trained = {row["prompt"] for row in train_rows}
    assert not trained & {row["prompt"] for row in test_rows}
    assert not {day(row) for row in train_rows} & {day(row) for row in test_rows}


def test_each_note_tells_all_that_its_record_holds(test_rows: list[ROW]) -> None:
    for row in test_rows:
        values = record(row)
        assert list(values) == ["customer", "item", "quantity", "date"]
        assert values["customer"] in row["prompt"]
        assert values["item"] in row["prompt"]
        assert values["date"][:4] in row["prompt"]


def test_data_can_be_made_again(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "make_data.py", "--output", tmp_path], check=True)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / "data" / name).read_bytes()


def day(row: ROW) -> str:
    return str(record(row)["date"])
