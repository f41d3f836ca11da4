"""An embedding and the output layer that shares its weight."""

from __future__ import annotations

import warnings

import pytest
import torch

import lorica
import models


def tied(**fields):
    config = lorica.LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorica.get_peft_model(models.tiny_llama(tied=True), config)


def test_tied_layers_train_one_pair_of_factors_from_both_ends():
    """The gradient is the sum of what both uses give, as if the delta stood in the one shared weight."""
    model = tied(ensure_weight_tying=True)
    base = model.get_base_model()
    factors, spec = base.model.embed_tokens.running()[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.embed_tokens.lora_embedding_A.default",
        "base_model.model.model.embed_tokens.lora_embedding_B.default",
    ]
    ids, hidden = torch.arange(1, 6), torch.randn(3, base.config.hidden_size)  # row 0 is padding, which never learns
    for use_head, use_embedding in ((True, False), (False, True), (True, True)):
        model.zero_grad()
        loss = (
            base.lm_head(hidden).square().sum() * use_head + base.model.embed_tokens(ids).square().sum() * use_embedding
        )
        loss.backward()
        a, b = (factor.detach().clone().requires_grad_() for factor in factors[:2])
        weight = base.lm_head.base_layer.weight + spec.scaling * (b @ a).T
        oracle = (hidden @ weight.T).square().sum() * use_head + weight[ids].square().sum() * use_embedding
        for factor, wanted in zip(factors[:2], torch.autograd.grad(oracle, (a, b)), strict=True):
            assert torch.allclose(factor.grad, wanted, rtol=1e-4, atol=1e-4)


def test_merging_tied_factors_keeps_the_weight_shared():
    model = tied(ensure_weight_tying=True)
    batch = models.ids(2, 5)
    adapted = model(batch).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert torch.allclose(merged(batch).logits, adapted, atol=1e-5)


def test_merging_one_of_two_that_share_a_weight_leaves_the_other_alone():
    model = tied()
    batch = models.ids(2, 5)
    adapted = model(batch).logits
    before = model.get_base_model().lm_head.weight.clone()
    with pytest.warns(UserWarning, match="tied_target_modules"):
        model.merge_adapter()
    assert torch.allclose(model(batch).logits, adapted, atol=1e-5)
    assert torch.equal(model.get_base_model().lm_head.weight, before)
    assert not model.get_base_model().config.tie_word_embeddings
    model.unmerge_adapter()
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    assert torch.equal(base.lm_head.weight, before)
    assert base.config.tie_word_embeddings
    with pytest.warns(UserWarning, match="tied_target_modules"):
        merged = model.merge_and_unload()
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert torch.allclose(merged(batch).logits, adapted, atol=1e-5)


def test_a_head_that_trained_apart_is_saved_apart(tmp_path):
    config = lorica.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lorica.get_peft_model(models.tiny_llama(tied=True), config)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
    batch = models.ids(2, 5)
    adapted = model(batch).logits
    merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert torch.allclose(type(merged).from_pretrained(tmp_path)(batch).logits, adapted, atol=1e-5)
