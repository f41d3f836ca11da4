"""What data says of how an adapter should start: statistics of base layers, collected over batches, on any layout."""

from lorica.calibration.corda import preprocess_corda
from lorica.calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
from lorica.calibration.loftq import replace_lora_weights_loftq
from lorica.calibration.lora_ga import preprocess_loraga

__all__ = [
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
]
