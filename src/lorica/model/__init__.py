"""The adapted model as users hold it: injection, the wrappers with PEFT's interface, and their status."""

from lorica.model.arrow import create_arrow_model
from lorica.model.factory import get_peft_model, inject_adapter_in_model
from lorica.model.hold import hold_adapters
from lorica.model.lora_model import LoraModel
from lorica.model.peft_model import PeftModel
from lorica.model.rows import route_rows
from lorica.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from lorica.model.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

__all__ = [
    "LoraModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "create_arrow_model",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "hold_adapters",
    "inject_adapter_in_model",
    "route_rows",
]
