"""The model card: facts for the hub, and a page that people may rewrite."""

from __future__ import annotations

import os

import pytest
from huggingface_hub import ModelCard

import lorica
import models
from lorica.checkpoint import card as cards_of


def adapted(**fields):
    config = lorica.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="someone/base", **fields
    )
    return lorica.get_peft_model(models.tiny_llama(), config)


def test_a_new_card_states_the_facts(tmp_path):
    adapted(r=4).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/base"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {"lora", "lorica", "base_model:adapter:someone/base"} <= set(card.data.tags)
    assert "| rank | 4 |" in card.text


def test_a_card_that_somebody_wrote_keeps_their_words(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# My words\n")
    adapted().create_or_update_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert {"mine", "lora"} <= set(card.data.tags)
    assert card.text.strip() == "# My words"


def test_a_card_that_a_stranger_made_stays_as_it_is_and_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("mine")
    lines = [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    bomb = "\n".join(["---", "a0: &a0 [x, x]", *lines, "---", ""])
    cards = {
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to(tmp_path / "secret"),
        "bomb": lambda path: path.write_text(bomb),
        "large": lambda path: path.write_text("x" * (5 * 2**20)),
    }
    for name, make in cards.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "README.md")
        before = os.lstat(folder / "README.md")
        with pytest.warns(UserWarning, match=r"stays as it is: .*README\.md"):
            cards_of.write(folder / "README.md", lorica.LoraConfig(), trainable=1, total=2)
        assert os.lstat(folder / "README.md") == before
