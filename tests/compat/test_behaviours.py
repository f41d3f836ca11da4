"""Code written for peft does the same on lorica when its import is changed, error messages included."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the comparison is with peft")

import real
import scenarios
import scenarios_of_state

pytestmark = pytest.mark.filterwarnings("ignore")

FOUND = {**vars(scenarios), **vars(scenarios_of_state)}
FUNCTIONS = {name: value for name, value in FOUND.items() if inspect.isfunction(value) and name[0] != "_"}
NAMES = [name for name, value in FUNCTIONS.items() if "lib" in inspect.signature(value).parameters]


def assert_same(ours: Any, theirs: Any, where: str = "result") -> None:
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-5, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(theirs, Mapping):
        assert sorted(ours) == sorted(theirs), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), f"{where}: {ours} != {theirs}"
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(theirs, scenarios.Message):
        assert isinstance(ours, scenarios.Message), where
        assert ours.startswith(theirs.strip().removesuffix(".")), f"{where}: {ours!r} is not {theirs!r}"
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("name", NAMES)
def test_one_import_changes_nothing(name, tmp_path, capsys):
    scenario = FUNCTIONS[name]
    found = {}
    for library in real.LIBRARIES:
        torch.manual_seed(0)
        folder = tmp_path / library
        folder.mkdir()
        extra = {"capsys": capsys} if "capsys" in inspect.signature(scenario).parameters else {}
        found[library] = scenario(real.library(library), folder, **extra)
    assert_same(_without_paths(found["lorica.compat.peft"], tmp_path), _without_paths(found["peft"], tmp_path))


def test_there_are_many():
    assert len(NAMES) > 50


def _without_paths(value: Any, folder: Any) -> Any:
    """The libraries have folders of their own, which messages name."""
    if type(value) in (str, scenarios.Message):
        plain = str(value)
        for library in real.LIBRARIES:
            plain = plain.replace(str(folder / library), "<folder>")
        return type(value)(plain)
    if isinstance(value, Mapping):
        return {key: _without_paths(entry, folder) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry, folder) for entry in value]
    return value
