"""Saved base models and adapters, and the merge that a loaded model writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from lorica import LoraConfig, PeftModel, get_peft_model

SHARDS = "6KB"


def save_base(model: nn.Module, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model in several small files."""
    model.to(dtype).save_pretrained(directory, max_shard_size=SHARDS)
    return directory


def load_base(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def save_adapter(base: Path, directory: Path, **fields: Any) -> Path:
    """Write an adapter whose every tensor does something."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_base(base), LoraConfig(**fields))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        model.save_pretrained(directory)
    return directory


def merge_loaded(adapter: Path, base: Path, directory: Path) -> Path:
    """Write what merging the loaded model gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload(safe_merge=True)
        model.save_pretrained(directory, max_shard_size=SHARDS)
    return directory


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model's files."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found
