"""peft.tuners.lora."""

from lorica.compat.peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lorica.compat.peft.tuners.lora.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from lorica.compat.peft.tuners.lora.model import LoraModel

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "VeloraConfig",
]
