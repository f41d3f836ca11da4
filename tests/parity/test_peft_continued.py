"""An adapter that one library began is continued by the other: the losses are those of one library throughout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from torch import nn

import lorica
from mixtures import moe
from models import ids, tiny_gpt2, tiny_llama

peft = twins.peft

STEPS = 6
#: What turns each feature on, for a model and its targets. More stand in the tests of their own features.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (tiny_llama, {"target_modules": "all-linear"}),
    "rslora": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "alpha_pattern": {"q": 3}}),
    "dora": (tiny_llama, {"target_modules": ["v_proj", "o_proj"], "use_dora": True}),
    "lora_bias": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "up_proj"]}),
    "modules_to_save": (tiny_llama, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "pissa": (tiny_llama, {"target_modules": ["v_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "kasa": (tiny_llama, {"target_modules": ["v_proj", "down_proj"], "kasa_config": {}}),
    "bdlora": (
        tiny_llama,
        {
            "target_modules": ["v_proj", "down_proj"],
            "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["v_proj"]},
        },
    ),
    "mica": (tiny_llama, {"target_modules": ["v_proj", "down_proj"], "init_lora_weights": "mica"}),
    "tokens": (tiny_llama, {"target_modules": ["v_proj"], "trainable_token_indices": [3, 7, 20]}),
    "experts": (moe, {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    "olora": (tiny_llama, {"target_modules": ["o_proj"], "init_lora_weights": "olora"}),
}


def start(library: Any, base: nn.Module, fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return library.get_peft_model(copy.deepcopy(base), library.LoraConfig(r=4, **copy.deepcopy(fields)))


def losses_of(model: nn.Module, steps: int = STEPS) -> list[float]:
    """Train by plain gradient descent, whose only state is the adapter."""
    model.eval()  # no dropout of the base model, which would differ from run to run
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        rows = ids(4, 8)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["peft, then lorica", "lorica, then peft"])
def test_training_goes_on_in_the_other_library(kind: str, order: str, tmp_path: Path) -> None:
    build, fields = KINDS[kind]
    base = build()
    first, second = (peft, lorica) if order.startswith("peft") else (lorica, peft)
    with twins.quiet():
        model = start(first, base, fields)
        begun = losses_of(model)
        model.save_pretrained(tmp_path)
        wanted = losses_of(model)
        other = second.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        continued = losses_of(other)
    assert min(begun[1:]) < begun[0]  # a router's choices jump, so that not every step is one down
    assert wanted[0] != pytest.approx(begun[0], rel=1e-4)
    assert continued == pytest.approx(wanted, rel=1e-5)
