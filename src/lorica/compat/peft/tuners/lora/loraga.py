"""peft.tuners.lora.loraga: what LoRA-GA needs to know of the data."""

from lorica.calibration import preprocess_loraga

__all__ = ["preprocess_loraga"]
