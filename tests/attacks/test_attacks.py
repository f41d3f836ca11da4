"""Hostile adapters are refused: in a second and 200 MB, with the file and what is wrong with it, and nothing happened.

Each attack of ``make.py`` is brought to every door of ``doors.py`` that it concerns.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doors import DOORS, MORE_DOORS, World, attempt, differences
from good_adapter import write_good
from make import SAMPLE, Attack, attacks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import models
from lorica.errors import LoricaError

pytest.importorskip("transformers")
pytest.importorskip("pydantic")
pytestmark = pytest.mark.filterwarnings("ignore")

ATTACKS = attacks()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], World]:
    """What makes worlds, after every door has been used once: what they import is imported."""
    folder = tmp_path_factory.mktemp("worlds")
    good, bad, base = (folder / name for name in ("good", "bad", "base"))
    models.tiny_llama().save_pretrained(base)
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b").save_pretrained(base)
    (base / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for place in (good, bad):
        write_good(place, str(base))
    ATTACKS["half the tensors"].spoil(bad)
    numbers = itertools.count()

    def make() -> World:
        return World(folder / f"world{next(numbers)}", base, good)

    for door in (*DOORS.values(), *MORE_DOORS.values()):
        door(make(), good)
        with contextlib.suppress(LoricaError):
            door(make(), bad)
    return make


@pytest.fixture(scope="module")
def shared(worlds: Callable[[], World]) -> list[World]:
    return [worlds()]


@pytest.fixture
def world(shared: list[World], worlds: Callable[[], World], request: pytest.FixtureRequest) -> Iterator[World]:
    """One for all attacks, since none may change it; a new one after one that did."""
    failed = request.session.testsfailed
    yield shared[0]
    if request.session.testsfailed > failed:
        shared[0] = worlds()


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_at_every_door(name: str, world: World, tmp_path: Path):
    attack, folder = ATTACKS[name], tmp_path / "adapter"
    write_good(folder, str(world.base))
    attack.spoil(folder)
    before = world.state()
    wrong = {}
    for door in {**DOORS, **MORE_DOORS} if name in SAMPLE else DOORS:
        if door not in attack.but and (found := problems(attack, door, world, folder)):
            wrong[door] = found
    if changed := differences(before, world.state()):
        wrong["any"] = [f"changed {place}" for place in changed]
    assert not wrong, "\n".join(f"{door}: {found}" for door, found in wrong.items())
    assert not (tmp_path / "canary").exists()


def problems(attack: Attack, door: str, world: World, folder: Path) -> list[str]:
    """Return what a refusal is not as it has to be."""
    error, excess = attempt(lambda: {**DOORS, **MORE_DOORS}[door](world, folder))
    if not isinstance(error, LoricaError):
        return [f"not refused: {type(error).__name__}: {str(error)[:300]}"]
    message, found = str(error), []
    if attack.file not in message:
        found.append(f"does not name {attack.file}: {message[:400]}")
    if not re.search(attack.says, message):
        found.append(f"does not say {attack.says}: {message[:400]}")
    if len(message) > 4000 or not message.replace("\n", "").isprintable():
        found.append(f"says too much, or what does not print: {len(message)} characters")
    return [*found, excess] if excess else found
