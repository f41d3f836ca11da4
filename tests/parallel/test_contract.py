"""The contract: every initialisation, variant and base layer on every layout, by registration alone.

``subjects.py`` has the models, ``divisions.py`` the ways of cutting them, ``contract_cases.py`` the adapters (from the
registries of ``src``), ``oracles.py`` what they give on one process and ``contract.py`` what is checked. What is
registered and appears nowhere fails here; what cannot appear says why in :data:`NOWHERE`.
"""

from __future__ import annotations

import os
from pathlib import Path

import contract
import contract_cases
import oracles
import pytest
import ranks
import torch
from divisions import DIVISIONS
from subjects import SUBJECTS
from torch import nn

from lorica.ops import OPS
from lorica.storage import LINEARS

#: Base layers that no subject has, and why.
NOWHERE: dict[str, str] = {
    **dict.fromkeys(LINEARS, "the contract compares plain weights; on ranks they are in test_quantised_ranks.py"),
    "transformer_engine.pytorch.module.linear.Linear": "its package needs a GPU",
    "transformer_engine.pytorch.module.layernorm_linear.LayerNormLinear": "its package needs a GPU",
}

PLACES = [
    pytest.param(division, subject, id=f"{division}-{subject}".replace(" ", "_"))
    for division, found in DIVISIONS.items()
    for subject in found.subjects
]

pytestmark = [
    # Of a frozen base layer's output nothing is changed in place; torch warns whenever a view is returned.
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:.*lora_dropout is not applied inside MultiheadAttention"),
    pytest.mark.filterwarnings("ignore:the following layers were initialized with init_lora_weights=True"),
]


#: Engines whose layers have tests of their own on ranks: tests/megatron, and test_neuronx.
ENGINES = ("megatron.", "neuronx_distributed.", "lorica.engines.megatron.")


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of the session share."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "oracles"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(("division", "subject"), PLACES)
def test_the_contract(division: str, subject: str, tmp_path: Path, known: Path, request: pytest.FixtureRequest) -> None:
    if not SUBJECTS[subject].there():
        pytest.skip(f"{subject} is not on this machine")
    SUBJECTS[subject].save(tmp_path / "base")
    words = request.config.getoption("--cases")
    left = [
        name
        for name in contract_cases.cases(division, subject)
        if not words or any(word.strip() in name for word in words.split(","))
    ]
    files = oracles.kept(known, subject, left, DIVISIONS[division].data)
    failures = []
    while left:
        names = {name: files[name] for name in left}
        try:
            ranks.run(DIVISIONS[division].ranks, contract.check, division, subject, names, str(tmp_path))
            break
        except ranks.RankError as error:
            name = (tmp_path / "trying").read_text()
            failures.append(f"{name}: {error}")
            left = left[left.index(name) + 1 :]
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("name", list(contract_cases.cases()))
def test_every_case_can_be_had_somewhere(name: str) -> None:
    """A case that every subject refuses would pass everywhere."""
    case = contract_cases.cases()[name]
    there = [subject for subject in SUBJECTS.values() if subject.there()]
    assert any(isinstance(contract.adapted(subject, case), nn.Module) for subject in there)


def test_every_base_layer_is_somewhere() -> None:
    """On ranks of its own: a new op needs a subject that has its layer, and a division that lays it over ranks."""
    found: set[type] = set()
    for subject, made in SUBJECTS.items():
        if made.there():
            for division in ("native tp2", "torch fsdp2", "torch fsdp2, adapted before"):
                if subject in DIVISIONS[division].subjects:
                    found |= set(ranks.run(DIVISIONS[division].ranks, contract.base_layers, division, subject)[0])
    known = {key if isinstance(key, str) else f"{key.__module__}.{key.__qualname__}" for key in OPS}
    known = {key for key in known if not key.startswith(ENGINES)}
    assert known - {f"{cls.__module__}.{cls.__qualname__}" for cls in found} == NOWHERE.keys()


def test_a_different_number_is_seen() -> None:
    """The comparisons compare."""
    one = torch.ones(4)
    contract.near(one, one.clone(), "the same")
    for other in (one + 2e-5, torch.ones(3), one * torch.nan):
        with pytest.raises(AssertionError):
            contract.near(other, one, "another")
    with pytest.raises(AssertionError):
        contract.equal(one + 1e-7, one, "another")
