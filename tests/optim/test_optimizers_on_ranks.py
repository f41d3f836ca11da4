"""On every layout the optimisers take the steps that they take on one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import contract
import divisions
import pytest
import ranks
import torch
from contract import Place, check_replicas, compare, config_of, entries, wholes
from contract_cases import Case
from subjects import SUBJECTS, batch, logits_of, loss_of
from torch import Tensor, nn

import lorica
from lorica import optim

LAYOUTS = [
    ("native tp2", "llama"),
    ("native tp2", "llama's ends"),
    ("native tp8", "llama"),  # keys and values lie on two ranks each
    ("native tp2", "phi3"),  # several projections in one weight
    ("native tp2 sp", "llama"),
    ("native fsdp2 tp2", "llama"),
    ("transformers ep2 tp2", "qwen3-moe"),
    ("torch fsdp2, adapted before", "llama"),  # factors are sharded by their rows, A by its rank
    ("torch tp2", "llama"),
]


def make(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "lora_fa":
        return optim.create_lorafa_optimizer(model, 4, 6, lr=1e-2)
    if kind == "riemannian":
        return optim.create_riemannian_optimizer(model, torch.optim.SGD, lr=5e-2, reg=0.1)
    # The embedding's rate is PEFT's own idea; here it has to move.
    return optim.create_loraplus_optimizer(
        model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_lr_embedding=1e-2
    )


KINDS = ("lora_fa", "riemannian", "loraplus")
CASE = Case({"init_lora_weights": False, "r": 4})
STEPS = 3


def alone(subject: str, data: int) -> dict[str, dict[str, Tensor]]:
    """What the factors of one process are after the steps of each kind."""
    found = {}
    for kind in KINDS:
        model = contract.adapt(SUBJECTS[subject].build(), config_of(SUBJECTS[subject], CASE)).train()
        optimizer = make(kind, model)
        for step in range(STEPS):
            model.zero_grad()
            for group in batch(contract.ROWS, seed=step).chunk(data):
                for rows in group.chunk(2):
                    (loss_of(logits_of(model(input_ids=rows)), rows) / data).backward()
            optimizer.step()
        found[kind] = wholes(entries(model))
    return found


@functools.cache
def on_one_process(subject: str, data: int) -> dict[str, dict[str, Tensor]]:
    """Once for all layouts."""
    return ranks.run(1, alone, subject, data)[0]


def stepped(division: str, subject: str, wanted: dict[str, dict[str, Tensor]], folder: str) -> None:
    place = Place(divisions.DIVISIONS[division], SUBJECTS[subject], Path(folder))
    cut = None
    for kind in KINDS:
        model = contract.adapt(place.cut() if cut is None else cut, place.config(CASE)).train()
        run = place.run(model)
        optimizer = make(kind, model)
        for step in range(STEPS):
            model.zero_grad()
            for rows in place.rows(batch(contract.ROWS, seed=step)).chunk(2):  # accumulated
                run.train(rows)
            optimizer.step()
        check_replicas(model)
        compare(entries(model), wanted[kind], f"{kind}: after steps", 5e-5)
        cut = place.base_again(model)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize(("division", "subject"), LAYOUTS)
def test_steps_are_those_of_one_process(division: str, subject: str, tmp_path: Path) -> None:
    """Of every kind, one after the other."""
    SUBJECTS[subject].save(tmp_path / "base")
    wanted = on_one_process(subject, divisions.DIVISIONS[division].data)
    ranks.run(divisions.DIVISIONS[division].ranks, stepped, division, subject, wanted, str(tmp_path))


def sent(folder: str) -> list[int]:
    """How many all-reduces each of two steps of LoRA-FA adds to plain SGD's."""
    model: Any = contract.adapt(
        divisions.native(tp=2)(SUBJECTS["llama"], folder),
        lorica.LoraConfig(r=4, init_lora_weights=False, **SUBJECTS["llama"].fields),
    ).train()
    optimizer = optim.create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    counts = []
    for step in range(2):
        ids = batch(2, seed=step)
        optimizer.zero_grad()
        loss_of(logits_of(model(input_ids=ids)), ids).backward()
        lorica.parallel.sum_gradients(model)
        with contract.Collectives() as seen:
            optimizer.step()
        counts.append(sum(seen.counts.values()))
    return counts


def test_what_lorafa_sends(tmp_path: Path) -> None:
    """All Gram matrices in one call, once: A is frozen."""
    assert ranks.run(2, sent, str(tmp_path)) == [[1, 0], [1, 0]]
