"""What the user asks for: configurations, their JSON form, and the frozen spec each target gets from them."""

from lorica.config.base import CONFIG_NAME, PeftConfig, PeftType, TaskType
from lorica.config.lora import LoraConfig, LoraRuntimeConfig
from lorica.config.options import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lorica.config.spec import AdapterSpec

__all__ = [
    "CONFIG_NAME",
    "AdapterSpec",
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "VeloraConfig",
]
