"""lorica: LoRA for every layout. One configuration, one API, one adapter file."""

from lorica._version import __version__
from lorica.calibration import (
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from lorica.checkpoint.loading import set_peft_model_state_dict
from lorica.checkpoint.saving import get_peft_model_state_dict
from lorica.combine import convert_to_lora, intruder_dimensions, reduce_intruder_dimension, save_as_lora
from lorica.config import (
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
    PeftConfig,
    PeftType,
    TaskType,
    VeloraConfig,
)
from lorica.convert import convert_adapter
from lorica.helpers import (
    DoraCaching,
    cast_mixed_precision_params,
    check_if_peft_model,
    prepare_model_for_kbit_training,
    rescale_adapter_scale,
)
from lorica.layers.gated import fuse_mlps, unfuse_mlps
from lorica.model import (
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    create_arrow_model,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    route_rows,
)
from lorica.model.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from lorica.optim import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from lorica.targets.kappa import find_kappa_target_modules

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "DoraCaching",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
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
    "VeloraConfig",
    "__version__",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "convert_adapter",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "find_kappa_target_modules",
    "fuse_mlps",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "intruder_dimensions",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "route_rows",
    "save_as_lora",
    "set_peft_model_state_dict",
    "unfuse_mlps",
]
