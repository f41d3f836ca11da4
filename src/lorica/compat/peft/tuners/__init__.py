"""peft.tuners: LoRA, the one method there is."""

from lorica.compat.peft.tuners.lora import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "VeloraConfig",
]
