"""Rows of embeddings that train: names, values, gradients, files and refusals are PEFT's."""

from __future__ import annotations

import warnings

import pytest
import torch
import twins
from twins import peft, quiet

import lorica
import models

CASES = [
    {"trainable_token_indices": [3, 1, 17]},
    {"trainable_token_indices": {"lm_head": [1, 3]}},
    {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [3, 1]}},
    {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]}},
    {"trainable_token_indices": [3, 1], "modules_to_save": ["norm"]},
    {"trainable_token_indices": {"down_proj": [0, 5]}},
]
TIED = [{"trainable_token_indices": [3, 17], "ensure_weight_tying": True}]


def adapted(tied=False, dtype=torch.float32, **fields):
    """Twins with the same random values in what trains."""
    with quiet():
        pair = twins.adapt(models.tiny_llama(tied=tied).to(dtype), {"r": 2, "target_modules": ["q_proj"], **fields})
    generator = torch.Generator().manual_seed(5)
    for parameter in pair[0].parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    with quiet():
        lorica.set_peft_model_state_dict(pair[1], peft.get_peft_model_state_dict(pair[0]))
    return pair


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", CASES)
def test_names_values_and_gradients_are_pefts(fields, tied):
    pair = adapted(tied, **fields)
    twins.assert_same_parameters(pair)
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()
    twins.assert_same_files(pair)
    twins.assert_same_run(pair, models.ids(3, 9), 1e-5)
    for theirs, ours in zip(pair[0].get_layer_status(), pair[1].get_layer_status(), strict=True):
        assert vars(theirs) == vars(ours)


def test_tied_layers_are_pefts():
    pair = adapted(True, **TIED[0])
    twins.assert_same_parameters(pair)
    twins.assert_same_run(pair, models.ids(3, 9), 1e-5)


def test_dtypes_are_pefts():
    pair = adapted(dtype=torch.bfloat16, trainable_token_indices=[1, 3])
    twins.assert_same_parameters(pair)


@pytest.mark.parametrize("fields", [*CASES, {"trainable_token_indices": [3], "target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize("tied", [False, True])
def test_files_are_read_by_either(fields, tied, tmp_path):
    pair = adapted(tied, **fields)
    batch = models.ids(3, 9)
    for saved, folder in zip(pair, ("theirs", "ours"), strict=True):
        with quiet():
            wanted = models.logits(saved, batch)
            saved.save_pretrained(tmp_path / folder)
            for loader in (peft.PeftModel, lorica.PeftModel):
                loaded = loader.from_pretrained(models.tiny_llama(tied=tied), str(tmp_path / folder))
                assert loaded.peft_config["default"].trainable_token_indices == fields["trainable_token_indices"]
                twins.assert_close(models.logits(loaded.eval(), batch), wanted, 1e-6)


@pytest.mark.parametrize("fields", CASES[:2])
def test_merged_weights_are_pefts(fields):
    theirs, ours = adapted(**fields)
    with quiet():
        theirs, ours = theirs.merge_and_unload(), ours.merge_and_unload()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        twins.assert_close(ours.state_dict()[name], tensor, 1e-6, name)


def test_a_model_that_asks_for_the_weight_gets_the_trained_rows():
    theirs, ours = (model.get_base_model().model.embed_tokens for model in adapted(trainable_token_indices=[3, 1]))
    assert torch.equal(ours.weight, theirs.weight)
    assert not torch.equal(ours.weight[3], ours.token_adapter.base_layer.weight[3])


@pytest.mark.parametrize(
    ("fields", "tied", "words"),
    [
        ({"trainable_token_indices": {"nope": [1]}}, False, "not found in the base model"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
            True,
            "Cannot ensure weight tying when different token indices",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]},
            False,
            "already marked to be trained fully",
        ),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            False,
            "trainable_token_indices cannot be applied to modules of type",
        ),
    ],
)
def test_refusals_are_pefts(fields, tied, words):
    fields = {"target_modules": ["q_proj"], **fields}
    with quiet():
        with pytest.raises((ValueError, TypeError), match=words):
            peft.get_peft_model(models.tiny_llama(tied=tied), peft.LoraConfig(**fields))
        model = models.tiny_llama(tied=tied)
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=words):
            lorica.get_peft_model(model, lorica.LoraConfig(**fields))
        assert [name for name, _ in model.named_modules()] == before


def test_ensuring_ties_that_are_not_there_says_so():
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": [1], "ensure_weight_tying": True}
    for adapt, config in ((peft.get_peft_model, peft.LoraConfig), (lorica.get_peft_model, lorica.LoraConfig)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapt(models.tiny_llama(), config(**fields))
        words = " ".join(str(warning.message) for warning in said)
        assert "the model does not have tied weights" in words
        assert "no tied modules were found" in words


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_models_tensors_keep_their_names(tied):
    from lorica.compat.peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict

    theirs, ours = adapted(tied, trainable_token_indices=[3])
    found = get_base_model_state_dict(ours)
    assert (
        found.keys()
        == peft.get_base_model_state_dict(theirs).keys()
        == models.tiny_llama(tied=tied).state_dict().keys()
    )
    set_base_model_state_dict(ours, {name: tensor + 1 for name, tensor in found.items()})
    assert torch.equal(ours.get_base_model().model.norm.weight, torch.full((16,), 2.0))
