"""peft.tuners.lora.config: ``LoraConfig`` and the options of single methods."""

from __future__ import annotations

from lorica import config as core
from lorica.compat.peft._library import foreign
from lorica.compat.peft.config import PeftConfig
from lorica.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

_THEIRS: tuple[type, ...] = tuple(cls for cls in (foreign("LoraConfig"),) if cls is not None)


class LoraConfig(PeftConfig, core.LoraConfig, *_THEIRS):  # type: ignore[misc]
    """The configuration of one adapter; see :class:`lorica.LoraConfig`. TRL and transformers take it as peft's."""


__all__ = [
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
    "VeloraConfig",
]
