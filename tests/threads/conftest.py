"""Turns in tests do not go by time, unless a test says so."""

from __future__ import annotations

import pytest

from lorica.layers.turns import Turns


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "patience", 1000.0)
