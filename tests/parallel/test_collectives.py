"""I4: LoRA adds no collective to forward and backward, and one for each axis to an optimiser step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import ranks
import torch
from contract import Collectives, adapt
from divisions import native, transformers
from subjects import SUBJECTS, batch, loss_of
from torch import nn

import lorica

#: Every column- and row-parallel layer, the embedding and the output layer.
TARGETS = [*SUBJECTS["llama"].fields["target_modules"], "embed_tokens", "lm_head"]
CUTS = {
    "native tp": native(tp=2),
    "native tp, sp": native(tp=2, sequence=True),
    "transformers tp": transformers(tp_size=2),
}


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"r": 4, "target_modules": TARGETS, "lora_bias": False, **fields})


def let_flow(model: nn.Module) -> None:
    """Let gradients flow from the embedding's output on, as they do with an adapter on it."""
    embedding = next(m for name, m in model.named_modules() if name.endswith("embed_tokens"))
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def per_pass(cut: str, folder: str) -> list[Counter[str]]:
    found = []
    for adapted in (False, True):
        model = CUTS[cut](SUBJECTS["llama"], folder)
        let_flow(model)
        model = adapt(model, config(lora_dropout=0.1)).train() if adapted else model
        with Collectives() as seen:
            loss_of(model(input_ids=batch(2)).logits, batch(2)).backward()
        found.append(seen.counts)
    return found


@pytest.mark.parametrize("cut", CUTS)
def test_forward_and_backward_send_what_the_base_sends(cut: str, tmp_path: Any) -> None:
    if cut.startswith("transformers"):
        SUBJECTS["llama"].build().save_pretrained(tmp_path)
    for frozen, adapted in ranks.run(2, per_pass, cut, str(tmp_path)):
        assert sum(frozen.values()) > 8, "the base sends something"
        assert adapted == frozen


def per_step(sizes: dict[str, int], targets: list[str], passes: int) -> list[Counter[str]]:
    """What two optimiser steps send after so many passes each, and what the passes send beyond the first."""
    model = adapt(native(**sizes)(SUBJECTS["llama"], ""), config(target_modules=targets))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    counts = []
    for _ in range(2):
        for _ in range(passes):
            loss_of(model(input_ids=batch(2)).logits, batch(2)).backward()
        with Collectives() as seen:
            optimizer.step()
        optimizer.zero_grad()
        counts.append(seen.counts)
    return counts


@pytest.mark.parametrize(
    ("sizes", "targets", "passes", "sums"),
    [
        ({"tp": 2}, ["down_proj"], 1, 1),
        ({"tp": 2}, TARGETS, 3, 1),
        ({"dp": 2, "tp": 2}, TARGETS, 2, 2),
    ],
    ids=["one kind of layer", "all layers, three passes", "two axes"],
)
def test_a_step_sends_one_bucket_for_each_axis(sizes: Any, targets: list[str], passes: int, sums: int) -> None:
    size = 2 * sizes.get("dp", 1)
    for first, second in ranks.run(size, per_step, sizes, targets, passes):
        assert second == {"allreduce_": sums}
        assert first["allreduce_"] == sums
