"""The guide's code runs as it stands, and what it says of fields is said of all of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from lorica.compat.megatron_bridge import VLMLoRA

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "from-megatron-bridge.md"


@pytest.mark.filterwarnings("ignore:.*requires torchvision")
def test_the_code_of_the_guide() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{GUIDE.name}, block {number}", "exec"), namespace)
    assert "model" in namespace


def test_every_field_is_in_the_guide() -> None:
    told = set(re.findall(r"`(\w+)`", GUIDE.read_text()))
    assert {field.name for field in dataclasses.fields(VLMLoRA) if field.repr} <= told
