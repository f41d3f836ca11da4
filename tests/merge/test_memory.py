"""A merge needs the memory of the largest tensor and a chunk, however large the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorica import LoraConfig, get_peft_model, get_peft_model_state_dict
from lorica.files.tensors import Stored, TensorWriter
from lorica.merge import stream

MIB = 1024 * 1024


def peak(reset: bool = False) -> int:
    """The most memory that this process had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def write_base(directory: Path, config: Any) -> tuple[int, int]:
    """Write a model of ones without having it; return its bytes, and those of its largest tensor."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    plan = {name: Stored("BF16", tuple(tensor.shape), 0, tensor.nbytes) for name, tensor in stored.items()}
    directory.mkdir()
    with TensorWriter(directory / "model.safetensors", plan, {"format": "pt"}) as writer:
        for name, tensor in stored.items():
            writer.write(name, torch.ones(tensor.shape, dtype=torch.bfloat16))
    config.save_pretrained(directory)
    sizes = [tensor.nbytes for tensor in stored.values()]
    return sum(sizes), max(sizes)


def write_adapter(directory: Path, config: Any, **fields: Any) -> None:
    """Write an adapter of halves."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **fields), low_cpu_mem_usage=True)
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
    directory.mkdir()
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, directory / "adapter_model.safetensors")
    adapted.peft_config["default"].save_pretrained(directory)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dora", [False, True])
def test_memory_is_that_of_the_largest_tensor(dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 1000, "num_attention_heads": 4}
    config = LlamaConfig(num_hidden_layers=6, num_key_value_heads=4, dtype="bfloat16", **sizes)
    total, largest = write_base(tmp_path / "base", config)
    write_adapter(tmp_path / "adapter", config, use_dora=dora)
    chunk = 128 * 1024
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr("lorica.variants.dora.CHUNK_ELEMENTS", chunk)
    merge = stream.Merge(tmp_path / "adapter", tmp_path / "base")
    for directory in ("first", "merged"):  # the first loads what torch loads when it first computes
        (tmp_path / directory).mkdir()
        before = peak(reset=True)
        merge.write("model.safetensors", tmp_path / directory, lambda count: None)
    allowed = largest + 4 * 4 * chunk + 6 * MIB  # four chunks of float32, and what Python and the file system take
    assert total > 5 * allowed
    assert peak() - before < allowed
