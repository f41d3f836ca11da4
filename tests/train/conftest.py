"""What all tests of training need."""

from __future__ import annotations

import pytest

import runs
from run_fixtures import base, data_file

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

__all__ = ["base", "data_file", "tokenizer"]


@pytest.fixture(scope="session")
def tokenizer():
    return runs.tokenizer()
