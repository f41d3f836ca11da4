"""What all tests of the command line need."""

from __future__ import annotations

import pytest

from run_fixtures import base, data_file

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

__all__ = ["base", "data_file"]
