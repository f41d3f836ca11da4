"""``megatron.bridge.peft.lora``: LoRA, and LoRA on vision-language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorica.compat.megatron_bridge._chunks import chunks_of
from lorica.compat.megatron_bridge._low_rank import LowRank
from lorica.compat.megatron_bridge.lora_merge import LoRAMerge
from lorica.targets.roles import Role, check_sees, role_of


@dataclass
class LoRA(LowRank):
    """One pair of factors on each linear layer, on a fused one (``linear_qkv``, gated ``linear_fc1``) too.

    Attributes:
        target_modules: names of modules; one with ``*`` is matched against full names, from beginning to end.
        exclude_modules: with no target modules: all linear layers but these, matched alike.
        dim: the rank.
        alpha: the numerator of the scale ``alpha / dim``.
        dropout: probability.
        dropout_position: ``"pre"`` on the way into A, ``"post"`` after B, before the scale.
        lora_A_init_method: how A starts: ``xavier`` (normal), ``kaiming`` (uniform, a = √5), ``normal`` (σ = 0.2) or
            ``zero``; always from the logical shape.
        lora_B_init_method: how B starts.
        a2a_experimental: under sequence parallelism, send each token's ``dim`` hidden values between A and B.
        lora_dtype: of the factors; None: the base weight's.
        normalize_moe_lora: experts get the rank ``dim // moe_router_topk``; alpha stays, so their scale grows.
        share_expert_adapters: the grouped experts of a layer have one adapter, whatever ranks they lie on; otherwise
            each has its own.
    """

    a2a_experimental: bool = False
    lora_dtype: torch.dtype | None = None
    normalize_moe_lora: bool = False
    share_expert_adapters: bool = True

    def lora_fields(self) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` that these mean."""
        return super().lora_fields() | {
            "a2a_experimental": self.a2a_experimental,
            "lora_dtype": self.lora_dtype,
            "normalize_moe_lora": self.normalize_moe_lora,
            "share_expert_adapters": self.share_expert_adapters,
            "fused_as_one": True,
        }


@dataclass
class VLMLoRA(LoRA):
    """LoRA on a vision-language model, of Megatron or of transformers, of which parts may train fully.

    What is neither of the three parts (what hears, speaks or draws) stays frozen.

    Attributes:
        freeze_vision_model: whether the vision tower is frozen.
        freeze_vision_projection: whether what leads from it into the language model is.
        freeze_language_model: whether the language model is, with its embedding and output layer.
    """

    freeze_vision_model: bool = True
    freeze_vision_projection: bool = True
    freeze_language_model: bool = True

    def freeze_model(self, model: nn.Module | list[Any], training: bool = True) -> None:
        """Freeze the parts that are to be; the others keep training, beside their adapters.

        Raises:
            TargetError: the model has no part that sees.
        """
        frozen: dict[Role, bool] = {
            "vision_model": self.freeze_vision_model,
            "vision_projection": self.freeze_vision_projection,
            "language_model": self.freeze_language_model,
            "other": True,
        }
        for chunk in chunks_of(model):
            if not hasattr(chunk, "vision_model"):  # Megatron's have none on the later stages of a pipeline
                check_sees(chunk)
            for name, parameter in chunk.named_parameters():
                if frozen[role_of(name)]:
                    parameter.requires_grad_(False)
        if training:
            for chunk in model if isinstance(model, list) else [model]:
                chunk.train()


__all__ = ["LoRA", "LoRAMerge", "VLMLoRA"]
