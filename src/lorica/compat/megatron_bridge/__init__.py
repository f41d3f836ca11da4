"""Megatron Bridge's methods of adaptation over lorica: ``from lorica.compat.megatron_bridge import LoRA``.

``megatron.bridge.peft.lora`` is ``lorica.compat.megatron_bridge.lora``, and so on. Megatron-Core is imported only where
a model of its layers is there already; models of transformers and plain torch are adapted alike.
"""

from lorica.compat.megatron_bridge.base import PEFT
from lorica.compat.megatron_bridge.canonical_lora import CanonicalLoRA
from lorica.compat.megatron_bridge.dora import DoRA
from lorica.compat.megatron_bridge.lora import LoRA, VLMLoRA
from lorica.compat.megatron_bridge.lora_merge import LoRAMerge
from lorica.compat.megatron_bridge.module_matcher import ModuleMatcher

__all__ = ["PEFT", "CanonicalLoRA", "DoRA", "LoRA", "LoRAMerge", "ModuleMatcher", "VLMLoRA"]
