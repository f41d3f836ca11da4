"""Rows that train, where embedding and head share a weight or have rows of their own, on layouts that cut both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import pytest
import ranks
import torch.distributed as dist
from contract import Place, config_of
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


def keeps(division: str, which: str, folder: str) -> None:
    """Everything that the contract asks of an adapter."""
    subject, fields = FIELDS[which]
    place = Place(DIVISIONS[division], subject, Path(folder))
    case = Case(fields)
    oracle = contract.adapt(subject.build(), config_of(subject, case))
    contract.check_all(place, case, oracle, place.division.cut(subject, str(place.folder / "base")))
    dist.barrier()
    started = Case({**fields, "init_lora_weights": True}, start=True)
    oracle = contract.adapt(subject.build(), config_of(subject, started))
    contract.check_start(place, started, oracle, place.division.cut(subject, str(place.folder / "base")))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("which", FIELDS)
@pytest.mark.parametrize("division", LAYOUTS)
def test_ends_keep_the_contract(division: str, which: str, tmp_path: Path) -> None:
    FIELDS[which][0].save(tmp_path / "base")
    ranks.run(DIVISIONS[division].ranks, keeps, division, which, str(tmp_path), timeout=200)
