"""One short training run for all tests that hit one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from whole_runs import run, settings, trace

import runs
from run_fixtures import base, data_file

__all__ = ["base", "data_file", "given", "values", "whole"]


@pytest.fixture(scope="session")
def given(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base model and fewer data."""
    return base, runs.write_jsonl(tmp_path_factory.mktemp("given") / "sums.jsonl", runs.sums(12))


@pytest.fixture
def values(given: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """Six steps, with a checkpoint after each second one, of which two are kept."""
    return settings(given, tmp_path / "out")


@pytest.fixture(scope="session")
def whole(given: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(settings(given, output))
    return trace(output)
