"""peft's import paths over lorica: ``import lorica.compat.peft as peft``.

Where peft is installed, the classes are instances of its own as well, so that transformers' ``Trainer``, TRL and
accelerate take them; see :mod:`lorica.compat.peft._library`.
"""

from lorica.compat.peft._hooks import take_over
from lorica.compat.peft.auto import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from lorica.compat.peft.config import PeftConfig, PromptLearningConfig
from lorica.compat.peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
    inject_adapter_in_model,
)
from lorica.compat.peft.mapping_func import get_peft_model
from lorica.compat.peft.mixed_model import PeftMixedModel
from lorica.compat.peft.peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_layer_status,
    get_model_status,
)
from lorica.compat.peft.tuners.lora import LoraConfig, LoraModel, LoraRuntimeConfig
