"""Packing changes where a document lies, never what the model sees of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import runs
from lorica.train import collate, evaluate
from lorica.train.collate import Batches, Collator
from lorica.train.data import IGNORE, Example


def document(length: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 300, (length,), generator=generator, dtype=torch.int32)
    labels = ids.clone()
    labels[: length // 2] = IGNORE
    return Example(ids, labels)


DOCUMENTS = [document(length, seed) for seed, length in enumerate((9, 4, 14, 7, 2, 11))]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_documents_have_the_logits_and_loss_of_lone_ones(attention: str, flatten: bool) -> None:
    model = runs.llama(attn_implementation=attention)
    packs = collate.pack(DOCUMENTS, 24)
    batch = Collator(0, flatten)(packs)
    with torch.no_grad():
        packed = collate.forward(model, batch["input_ids"], batch["position_ids"])
        summed, count = evaluate.token_losses(model, batch)
        total, tokens = 0.0, 0
        for row, members in enumerate([[d for p in packs for d in p]] if flatten else packs):
            start = 0
            for member in members:
                lone = Collator(0)([[member]])
                logits = collate.forward(model, lone["input_ids"], lone["position_ids"])[0]
                torch.testing.assert_close(packed[row, start : start + len(member)], logits, rtol=1e-5, atol=1e-5)
                loss, number = evaluate.token_losses(model, lone)
                total, tokens = total + float(loss), tokens + number
                start += len(member)
    assert count == tokens
    assert float(summed) == pytest.approx(total, rel=1e-6)


def test_padding_is_never_seen() -> None:
    model = runs.llama()
    with torch.no_grad():
        together = evaluate.token_losses(model, Collator(3)([[item] for item in DOCUMENTS]))
        lone = [evaluate.token_losses(model, Collator(0)([[item]])) for item in DOCUMENTS]
    assert together[1] == sum(count for _, count in lone)
    assert float(together[0]) == pytest.approx(sum(float(loss) for loss, _ in lone), rel=1e-6)


def test_packs_hold_every_document_once_and_fit() -> None:
    documents = [document(2 + (7 * index) % 19, index) for index in range(60)]
    packs = collate.pack(documents, 20)
    assert sorted(id(item) for pack in packs for item in pack) == sorted(map(id, documents))
    assert max(sum(map(len, pack)) for pack in packs) <= 20
    assert len(packs) <= 1.1 * sum(map(len, documents)) / 20 + 1


def test_a_model_that_mixes_documents_is_found_out() -> None:
    batch = Collator(0)([DOCUMENTS[:2]])
    model = runs.llama()
    assert collate.documents_are_separate(model, batch)
    blind = runs.llama()
    inner = blind.forward

    def forward(input_ids: Any, use_cache: bool) -> Any:
        return inner(input_ids=input_ids, use_cache=use_cache)

    blind.forward = forward
    assert not collate.documents_are_separate(blind, batch)


def architecture(name: str) -> Any:
    import transformers

    small: dict[str, Any] = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    window = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "sliding_window": 4}
    torch.manual_seed(0)
    kinds = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {}),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, window),
        "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM, {}),
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM, {"state_size": 4}),
    }
    config, model, more = kinds[name]
    return model(config(initializer_range=0.2, **small, **more)).eval()


@pytest.mark.parametrize(("name", "separate"), [("gpt2", True), ("gemma2", True), ("bloom", False), ("mamba", False)])
def test_whether_an_architecture_can_be_packed_is_found_by_trying(name: str, separate: bool) -> None:
    model = architecture(name)
    batch = Collator(0)([DOCUMENTS[:3]])
    assert collate.documents_are_separate(model, batch) is separate
    if separate:
        with torch.no_grad():
            packed, _ = evaluate.token_losses(model, batch)
            lone = [evaluate.token_losses(model, Collator(0)([[item]]))[0] for item in DOCUMENTS[:3]]
        assert float(packed) == pytest.approx(float(sum(lone)), rel=1e-5)


def test_every_epoch_has_its_own_order_and_any_position_can_be_resumed() -> None:
    packs = [[item] for item in DOCUMENTS]
    stream = iter(Batches(packs, Collator(0), 4, seed=3))
    batches = [next(stream)["input_ids"] for _ in range(8)]
    assert [len(batch) for batch in batches] == [4, 2] * 4
    epochs = [sorted(row[row != 0].tolist() for batch in batches[i : i + 2] for row in batch) for i in (0, 2)]
    assert epochs[0] == epochs[1]
    assert not torch.equal(batches[0], batches[2])
    for position in range(8):
        again = Batches(packs, Collator(0), 4, seed=3)
        again.load_state_dict({"position": position})
        assert torch.equal(next(iter(again))["input_ids"], batches[position])
