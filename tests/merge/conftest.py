"""No progress bars of transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")

from transformers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def _silent() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
