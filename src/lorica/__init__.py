"""lorica: LoRA for every layout. One configuration, one API, one adapter file."""

from lorica._version import __version__
from lorica.checkpoint.loading import set_peft_model_state_dict
from lorica.checkpoint.saving import get_peft_model_state_dict
from lorica.config import LoraConfig, LoraRuntimeConfig, PeftConfig, PeftType, TaskType
from lorica.helpers import cast_mixed_precision_params, prepare_model_for_kbit_training
from lorica.model import (
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)

__all__ = [
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "__version__",
    "cast_mixed_precision_params",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
