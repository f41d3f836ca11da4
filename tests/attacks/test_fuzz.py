"""Mutated files, with fixed seeds: a few hundred of what ``python tests/attacks/fuzz.py`` does for hours.

The good files have 150 kB together and are made in about a second; a read takes 10 to 100 ms.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz import Fuzzer
from mutations import BYTES, VALUES, edit_archive, edit_header, edit_json, edit_pickle

ROUNDS = {"adapter": 80, "peft": 30, "bridge": 40, "neuron": 30, "run": 40, "recipe": 60}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    """Good files of every kind, in one process."""
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", ROUNDS)
def test_whatever_is_done_to_files_they_are_refused_or_what_they_say(name: str, fuzzer: Fuzzer) -> None:
    fuzzer.outcomes.clear()
    findings = [found for seed in range(ROUNDS[name]) if (found := fuzzer.round(name, seed))]
    assert findings == []
    assert 0 < fuzzer.outcomes["nothing"] < ROUNDS[name], "mutations change something, and not everything matters"


def test_all_kinds_of_files_are_mutated(fuzzer: Fuzzer) -> None:
    assert fuzzer.victims.keys() == ROUNDS.keys()


@pytest.mark.parametrize("wrong", ["raises", "changes", "writes", "hangs"])
def test_what_breaks_the_rule_is_found(wrong: str, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle sees another error, a changed model, a file written elsewhere, and what takes too long."""
    good = fuzzer.victims["adapter"]
    elsewhere = fuzzer.place.parent / "elsewhere"

    def read(folder: Path, output: Path) -> None:
        if wrong == "raises":
            raise KeyError("r")
        if wrong == "writes":
            elsewhere.write_text("")
        while wrong == "hangs":
            pass
        if wrong == "changes":
            raise AssertionError("a model was changed")

    monkeypatch.setitem(fuzzer.victims, "adapter", good._replace(read=read))
    monkeypatch.setattr("costs.HANG", 0.3)
    found = fuzzer.round("adapter", 0)
    says = {"raises": "KeyError", "changes": "was changed", "writes": "elsewhere", "hangs": "a hang"}
    assert found is not None
    assert says[wrong] in found.problem


def test_mutations_change_what_they_are_for() -> None:
    """None of them leaves most of its files as they were."""
    data = b'{"a": [1, 2, {"b": "c"}], "d": null, "e": 0.5}'
    header = len(data).to_bytes(8, "little") + data + b"\0" * 16
    for mutation in (*BYTES, edit_json, edit_header, edit_pickle, edit_archive):
        given = header if mutation is edit_header else data
        changed = sum(mutation(given, random.Random(seed)) != given for seed in range(200))
        assert changed > 120, mutation.__name__
    assert len(VALUES) > 50
