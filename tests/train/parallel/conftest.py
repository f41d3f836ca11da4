"""The harness for many ranks lies beside the tests of parallel layers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "parallel"))
