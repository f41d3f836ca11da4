"""The adapter of the tiny Llama of ``models.tiny_llama`` that nothing is wrong with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANK = 4
_OUT = {"q_proj": 16, "v_proj": 8}
_A, _B = "base_model.model.model.layers.0.self_attn.q_proj.lora_", ".weight"
FIRST_A, FIRST_B = f"{_A}A{_B}", f"{_A}B{_B}"


def good_tensors() -> dict[str, Tensor]:
    """Return factors of q_proj and v_proj of two layers."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for layer in range(2):
        for name, out in _OUT.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            found[f"{path}.lora_A.weight"] = torch.randn(RANK, 16, generator=generator)
            found[f"{path}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    return found


def good_config(base: str = "base") -> dict[str, Any]:
    """Return the configuration of these factors."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": sorted(_OUT),
        "inference_mode": True,
    }


def write_good(folder: Path, base: str = "base") -> None:
    """Write the adapter that nothing is wrong with."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(good_config(base)))
    (folder / WEIGHTS).write_bytes(save(good_tensors(), {"format": "pt"}))
