"""Turns that do not go by time, unless a test says so; adapters in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_models import base, config
from safetensors.torch import load_file, save_file

import lorica
from lorica.layers.turns import Turns
from models import randomise


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "patience", 1000.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of an adapter, and one whose last tensor is not finite."""
    where = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("old", "new", "broken")):
        randomise(lorica.get_peft_model(base(), config()), seed).save_pretrained(where / name)
    path = where / "broken" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[max(tensors)][0, 0] = torch.nan
    save_file(tensors, path)
    return where
