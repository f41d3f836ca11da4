"""peft.utils.loftq_utils: factors that start as what quantisation lost."""

from lorica.calibration import replace_lora_weights_loftq

__all__ = ["replace_lora_weights_loftq"]
