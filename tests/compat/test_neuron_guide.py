"""The guide's code runs as it stands, on the ranks that it names."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import ranks

import lorica
from lorica.compat import optimum_neuron as neuron

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "from-optimum-neuron.md"


def _run(folder: str) -> None:
    os.chdir(folder)
    namespace: dict[str, object] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)):
        exec(compile(block, f"{GUIDE.name}, block {number}", "exec"), namespace)
    assert type(namespace["model"]) is neuron.NeuronPeftModelForCausalLM


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_guide(tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    ranks.run(2, _run, str(tmp_path))
    assert lorica.LoraConfig.from_pretrained(tmp_path / "adapter").task_type == "CAUSAL_LM"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_its_imports_are_there() -> None:
    """Whatever a line of the guide's table imports."""
    import importlib

    named = re.findall(r"`from (lorica[\w.]+) import", GUIDE.read_text())
    assert len(named) >= 4
    for path in named:
        importlib.import_module(path)
