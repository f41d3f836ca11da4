"""peft.utils.constants: names of files, and what stands for what."""

from __future__ import annotations

from typing import Any

import torch

from lorica.checkpoint.names import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from lorica.config import CONFIG_NAME
from lorica.targets.defaults import DEFAULT_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

#: Pickled weights, which lorica neither reads nor writes: a pickle can run code.
WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
#: The configuration that stands for that of a model without one.
DUMMY_MODEL_CONFIG: dict[str, Any] = {"model_type": "custom"}
#: From so many names on, target modules are saved as the shortest endings that mean the same modules.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
]
