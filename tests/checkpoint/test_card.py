"""The model card: facts for the hub, and a page that people may rewrite."""

from __future__ import annotations

from huggingface_hub import ModelCard

import lorica
import models


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
