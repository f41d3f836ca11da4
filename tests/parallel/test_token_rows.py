"""Rows that train, where embedding and head share a weight or have rows of their own, on layouts that cut both."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import contract
import oracles
import pytest
import ranks
import torch.distributed as dist
from contract import Oracle, Place
from contract_cases import Case
from divisions import DIVISIONS
from subjects import SUBJECTS, Subject
from torch import nn

LAYOUTS = [
    "native tp2",
    "native tp8",
    "native tp2 sp",
    "native fsdp2 tp2",
    "transformers tp2",
    "torch fsdp2",
    "torch fsdp2, adapted before",
    "native tp2, adapted before",
]


def tied() -> nn.Module:
    """A Llama whose head shares the embedding's weight."""
    from subjects import _SIZES
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=48, tie_word_embeddings=True))


FIELDS: dict[str, tuple[Subject, dict[str, Any]]] = {
    "tied": (Subject(tied, {"target_modules": ["q_proj"]}), {"trainable_token_indices": [37, 5, 20, 3]}),
    "apart": (
        Subject(SUBJECTS["llama"].make, {"target_modules": ["q_proj"]}),
        {"trainable_token_indices": {"embed_tokens": [37, 5], "lm_head": [5, 20, 21]}},
    ),
}


def cases(which: str) -> tuple[Case, Case]:
    """Of a training run, and of what it starts from."""
    fields = FIELDS[which][1]
    return Case(fields), Case({**fields, "init_lora_weights": True}, start=True)


def alone(which: str, data: int) -> list[Oracle]:
    return [oracles.oracle(FIELDS[which][0], case, data) for case in cases(which)]


@functools.cache
def on_one_process(which: str, data: int) -> list[Oracle]:
    """Once for all layouts."""
    return ranks.run(1, alone, which, data)[0]


def keeps(division: str, which: str, found: list[Oracle], folder: str) -> None:
    """Everything that the contract asks of an adapter."""
    place = Place(DIVISIONS[division], FIELDS[which][0], Path(folder))
    cut = None
    for case, oracle, check in zip(cases(which), found, (contract.check_all, contract.check_start), strict=True):
        model = check(place, case, oracle, place.cut() if cut is None else cut)
        cut = place.base_again(model)
        dist.barrier()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("which", FIELDS)
@pytest.mark.parametrize("division", LAYOUTS)
def test_ends_keep_the_contract(division: str, which: str, tmp_path: Path) -> None:
    FIELDS[which][0].save(tmp_path / "base")
    found = on_one_process(which, DIVISIONS[division].data)
    ranks.run(DIVISIONS[division].ranks, keeps, division, which, found, str(tmp_path))
