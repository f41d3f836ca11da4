"""One tiny model directory and one data file, for the tests of training, of the command line and of crashes."""

from __future__ import annotations

from pathlib import Path

import pytest

import runs


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", runs.sums(30))
