"""Make the ``benchmarks`` package importable: it lies beside ``src`` and is not installed."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the benchmarks compare with PEFT: pip install peft==0.21.2")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
