"""Adapted transformers models generate, checkpoint their activations, keep their ties and their fast paths honest."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import assert_close
from torch import Tensor, nn

import lorica
from models import ids, randomise, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

LLAMA = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def adapted(base: nn.Module, **fields: object) -> nn.Module:
    return lorica.get_peft_model(base, lorica.LoraConfig(**{**LLAMA, **fields})).eval()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_the_merged_models(use_cache: bool) -> None:
    model = adapted(tiny_llama())
    arguments = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    prompt = ids(2, 4)
    out = model.generate(input_ids=prompt, **arguments)
    assert torch.equal(model.generate(prompt, **arguments), out)
    base = tiny_llama()
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=prompt, **arguments), base.generate(prompt, **arguments))
    assert torch.equal(model.merge_and_unload().generate(prompt, **arguments), out)


def test_generation_of_other_models() -> None:
    arguments = {"max_new_tokens": 5, "do_sample": False}
    gpt2 = adapted(tiny_gpt2(), fan_in_fan_out=True)
    assert gpt2.generate(input_ids=ids(1, 3), **arguments).shape[1] <= 8
    t5 = adapted(tiny_t5(), task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    assert t5.generate(input_ids=ids(1, 3), **arguments).shape[0] == 1


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids(2, 6), labels=ids(2, 6), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing(use_reentrant: bool, when: str) -> None:
    """Recomputed activations give the same gradients, even where the first layer's input wants none."""
    fields = {"lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
    plain, base, arguments = tiny_llama(), tiny_llama(), {"use_reentrant": use_reentrant}
    torch.manual_seed(1)
    expected = gradients(adapted(plain, **fields).train())
    if when == "before":
        base.gradient_checkpointing_enable(arguments)
    torch.manual_seed(1)
    model = adapted(base, **fields).train()
    if when == "after":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(arguments)
    actual = gradients(model)
    assert list(actual) == list(expected)
    for name, grad in expected.items():
        assert_close(actual[name], grad, 1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_repeats_the_dropout(use_reentrant: bool) -> None:
    fields = {"lora_dropout": 0.5, "target_modules": ["q_proj"]}
    results = []
    for checkpoint in (False, True):
        base = tiny_llama()
        if checkpoint:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model = adapted(base, **fields).train()
        torch.manual_seed(2)
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert_close(results[1][name], grad, 1e-6)


def test_labels_attention_masks_and_embeddings_pass_through() -> None:
    model, base = adapted(tiny_llama()), tiny_llama()
    merged = copy.deepcopy(model).merge_and_unload()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    batch = {"input_ids": ids(2, 6), "attention_mask": mask, "labels": ids(2, 6)}
    assert_close(model(**batch).loss, merged(**batch).loss, 1e-5)
    embeds = base.get_input_embeddings()(ids(2, 6))
    assert_close(model(inputs_embeds=embeds).logits, merged(inputs_embeds=embeds).logits, 1e-5)
    assert model.get_input_embeddings() is model.base_model.model.get_input_embeddings()
    assert model.config is model.base_model.model.config


@pytest.mark.parametrize(
    ("head", "labels"),
    [("SequenceClassification", torch.tensor([0, 2])), ("TokenClassification", torch.zeros(2, 6, dtype=torch.long))],
)
def test_task_heads_train(head: str, labels: Tensor) -> None:
    task = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}[head]
    model = lorica.get_peft_model(tiny_bert(head), lorica.LoraConfig(task_type=task)).train()
    model(input_ids=ids(2, 6), labels=labels).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("classifier.modules_to_save.default" in name for name in trained)
    assert any("lora_B" in name for name in trained)
    assert not any("original_module" in name or "base_layer" in name for name in trained)


def test_a_tied_head_keeps_the_base_weight_shared() -> None:
    base = tiny_llama(tied=True)
    model = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert base.lm_head.weight is base.model.embed_tokens.weight
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_tied_factors_stay_tied_while_they_train() -> None:
    config = lorica.LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = randomise(lorica.get_peft_model(tiny_llama(tied=True), config)).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        gradients(model)
        optimiser.step()
    saved = lorica.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert len({tensor.abs().sum().item() for tensor in saved.values()}) == 2
    embedding, head = "base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_"
    assert torch.equal(saved[f"{embedding}A"].T, saved[f"{head}B.weight"])
    assert torch.equal(saved[f"{embedding}B"].T, saved[f"{head}A.weight"])


ENCODER_TARGETS = [["linear1"], ["linear2"], ["linear1", "linear2"], ["self_attn"], ["self_attn", "linear1", "linear2"]]


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids="+".join)
@pytest.mark.parametrize("stack", [False, True], ids=["layer", "encoder"])
def test_the_encoder_fast_path_does_not_bypass_adapters(targets: list[str], stack: bool) -> None:
    """In evaluation without gradients torch hands the raw weights to one fused kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2) if stack else nn.Sequential(layer)
    config = lorica.LoraConfig(target_modules=targets, init_lora_weights=False, lora_alpha=32)
    model = lorica.get_peft_model(copy.deepcopy(net), config).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast, base = model(x), net.eval()(x)
    assert_close(fast, model.train()(x), 1e-5)
    assert (fast - base).norm() > 1e-2 * base.norm()
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        assert_close(model(x), base, 1e-6)
    with torch.no_grad():
        assert_close(model.merge_and_unload()(x), fast, 1e-5)


@pytest.mark.parametrize("padding", [False, True])
def test_attention_masks_and_weights(padding: bool) -> None:
    """Every argument of ``nn.MultiheadAttention`` keeps its meaning."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    config = lorica.LoraConfig(target_modules=["attn"], init_lora_weights=False)
    model = lorica.get_peft_model(copy.deepcopy(base), config).eval()
    merged = copy.deepcopy(model).merge_and_unload()["attn"]
    attn = model.base_model.model["attn"]
    q, kv = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[False] * 4, [False, False, True, True]]) if padding else None
    for arguments in ({}, {"average_attn_weights": False}, {"attn_mask": torch.zeros(3, 4, dtype=torch.bool)}):
        out, weights = attn(q, kv, kv, key_padding_mask=mask, **arguments)
        expected, expected_weights = merged(q, kv, kv, key_padding_mask=mask, **arguments)
        assert_close(out, expected, 1e-5)
        assert_close(weights, expected_weights, 1e-5)


def test_training_lowers_the_loss() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], init_lora_weights=True).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids(2, 8), labels=ids(2, 8)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
