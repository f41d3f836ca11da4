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
from lorica.compat.peft.helpers import find_kappa_target_modules
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
from lorica.compat.peft.tuners.lora import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
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
from lorica.compat.peft.tuners.lora.arrow import create_arrow_model
from lorica.compat.peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from lorica.compat.peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from lorica.compat.peft.tuners.lora.loraga import preprocess_loraga
from lorica.compat.peft.tuners.trainable_tokens import TrainableTokensConfig
from lorica.compat.peft.utils import (
    NoMatchingPeftModuleError,
    PeftError,
    PeftType,
    PeftWarning,
    TaskType,
    cast_mixed_precision_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    shift_tokens_right,
)
from lorica.compat.peft.utils.loftq_utils import replace_lora_weights_loftq

#: The version of peft whose interface this is, for code that asks.
__version__ = "0.21.2"

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PromptLearningConfig",
    "TaskType",
    "TrainableTokensConfig",
    "VeloraConfig",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "create_arrow_model",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "take_over",
]
