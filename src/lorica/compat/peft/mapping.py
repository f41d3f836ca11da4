"""peft.mapping: from a method's name to its classes, and injection without a wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorica.compat.peft.config import PeftConfig, ours
from lorica.compat.peft.tuners.lora.config import LoraConfig
from lorica.compat.peft.tuners.lora.model import LoraModel
from lorica.config import PeftType

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[LoraModel]] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.LORA: LoraModel.prefix}
#: Methods that can be mixed with others; there is one method.
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type[LoraModel]] = {}


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Return the configuration whose fields ``config_dict`` gives, ``peft_type`` among them."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config_dict["peft_type"])](**config_dict)


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt ``model`` in place and return it, without a wrapper; see :func:`lorica.inject_adapter_in_model`.

    Raises:
        ValueError: the configuration is one of prompt learning.
    """
    if getattr(peft_config, "is_prompt_learning", False) or getattr(peft_config, "is_adaption_prompt", False):
        raise ValueError("`create_and_replace` does not support prompt learning, adaption prompt and shadow yet.")
    LoraModel(model, ours(peft_config), adapter_name, low_cpu_mem_usage, state_dict)
    return model


__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]
