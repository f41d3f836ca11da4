"""A swap on every layout: each rank reads its rectangles, of other ranks and scales."""

from __future__ import annotations

from pathlib import Path

import contract
import divisions
import pytest
import ranks
import torch.distributed as dist
from contract import ROWS, Place, compare, config_of, entries, near, wholes
from contract_cases import Case
from divisions import Plain
from subjects import SUBJECTS, batch

import lorica
from lorica.errors import RankError, SwapError
from lorica.model.hotswap import hotswap_adapter

PLACES = [
    ("native tp2", "llama"),
    ("native tp2", "llama's ends"),
    ("native tp8", "llama"),
    ("native tp2", "phi3"),
    ("native fsdp2 tp2", "llama"),
    ("native pp2", "llama"),
    ("transformers tp2", "llama"),
    ("transformers ep2 tp2", "qwen3-moe"),
    ("torch fsdp2", "llama"),
]
FIELDS = ({"r": 6}, {"r": 2, "lora_alpha": 5}, {"r": 8, "lora_alpha": 3})


def prepared(folder: str, subject: str) -> None:
    """Save one adapter after the other, on one process."""
    for number, fields in enumerate(FIELDS):
        case = Case({"init_lora_weights": False, **fields})
        model = contract.adapt(SUBJECTS[subject].build(number), config_of(SUBJECTS[subject], case))
        model.save_pretrained(Path(folder) / str(number), save_embedding_layers=False)


def swapped(division: str, subject: str, folder: str) -> None:
    place = Place(divisions.DIVISIONS[division], SUBJECTS[subject], Path(folder))
    ids = place.rows(batch(ROWS))
    models = [place.subject.build(), place.division.cut(place.subject, str(place.folder / "base"))]
    oracle, model = (lorica.PeftModel.from_pretrained(base, place.folder / "0") for base in models)
    run = place.run(model)
    for number in (1, 2, 0):
        for adapted in (oracle, model):
            hotswap_adapter(adapted, place.folder / str(number), "default")
        compare(entries(model), wholes(entries(oracle)), f"I6: swapped in {number}", 0.0)
        near(run.logits(ids), Plain(oracle).logits(ids), f"I1: the output with {number}")


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize(("division", "subject"), PLACES)
def test_every_rank_swaps_its_part(division: str, subject: str, tmp_path: Path) -> None:
    SUBJECTS[subject].save(tmp_path / "base")
    prepared(str(tmp_path), subject)
    ranks.run(divisions.DIVISIONS[division].ranks, swapped, division, subject, str(tmp_path))


def failed(folder: str) -> None:
    model = lorica.PeftModel.from_pretrained(divisions.native(tp=2)(SUBJECTS["llama"], ""), f"{folder}/0")
    before = {name: entry.tensor.clone() for name, entry in entries(model).items()}
    with pytest.raises((RankError, SwapError)):
        hotswap_adapter(model, f"{folder}/{'1' if dist.get_rank() else 'not there'}", "default")
    for name, entry in entries(model).items():
        contract.equal(entry.tensor, before[name], name)


def test_where_one_rank_fails_none_swaps(tmp_path: Path) -> None:
    prepared(str(tmp_path), "llama")
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(2, failed, str(tmp_path))
    assert set(caught.value.failed) == {0}  # which has its own error
    assert "not there" in caught.value.failed[0]
