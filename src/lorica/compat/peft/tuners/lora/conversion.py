"""peft.tuners.lora.conversion: an adapter of any variant as plain LoRA."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorica import combine
from lorica.combine import save_as_lora
from lorica.compat.peft.config import ours
from lorica.compat.peft.tuners.lora.config import LoraConfig


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return configuration and tensors of the nearest plain LoRA; see :func:`lorica.convert_to_lora`."""
    config, tensors = combine.convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    return ours(config), tensors


__all__ = ["convert_to_lora", "save_as_lora"]
