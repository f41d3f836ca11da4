"""Layers that stand in a model several times: names, values, gradients and files are PEFT's."""

from __future__ import annotations

import pytest
import torch
import twins
from twins import peft, quiet

import lorica
import models

FIELDS = {"r": 2, "target_modules": ["q_proj", "down_proj"], "layer_replication": [(0, 2), (1, 3), (0, 1)]}


def test_a_replicated_stack_is_pefts(tmp_path):
    pair = twins.adapted(models.tiny_llama(layers=3), FIELDS)
    twins.assert_same_parameters(pair)
    twins.assert_same_run(pair, models.ids(2, 7), 1e-5)
    twins.assert_same_files(pair)
    for model in pair:
        base = model.get_base_model()
        assert base.config.num_hidden_layers == len(base.model.layers) == 5
        assert [layer.self_attn.layer_idx for layer in base.model.layers] == list(range(5))
    with quiet():
        tokens = [
            model.eval().generate(input_ids=models.ids(1, 4), max_new_tokens=6, do_sample=False) for model in pair
        ]
    assert torch.equal(*tokens)
    wanted = models.logits(pair[0], models.ids(2, 7))
    for name, model in zip(("theirs", "ours"), pair, strict=True):
        with quiet():
            model.save_pretrained(tmp_path / name)
            for loader in (peft.PeftModel, lorica.PeftModel):
                loaded = loader.from_pretrained(models.tiny_llama(layers=3), str(tmp_path / name))
                twins.assert_close(models.logits(loaded.eval(), models.ids(2, 7)), wanted, 1e-6)


def test_another_family():
    twins.assert_same_run(
        twins.adapted(models.tiny_bert_encoder(), {"target_modules": ["query"], "layer_replication": [(0, 2), (0, 1)]}),
        models.ids(2, 7),
        1e-5,
    )


@pytest.mark.parametrize("library", ["peft", "lorica"])
def test_a_model_without_layers_is_refused(library):
    used = peft if library == "peft" else lorica
    config, adapt = used.LoraConfig, used.get_peft_model
    with pytest.raises(ValueError, match="Could not locate the layers attribute in the model"):
        adapt(models.mlp(), config(target_modules=["lin0"], layer_replication=[(0, 1)]))
