"""The guide's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the integrations need it")
pytest.importorskip("trl", reason="the guide uses it")

import real

from lorica.compat.peft import take_over
from lorica.layers import LoraLayer

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "from-peft.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_guide(tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(real.DEMO)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"{GUIDE.name}, block {number}", "exec"), namespace)
    finally:
        take_over(False)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    model = namespace["model"]
    assert any(isinstance(module, LoraLayer) for module in model.modules())
