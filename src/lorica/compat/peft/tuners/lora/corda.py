"""peft.tuners.lora.corda: what CorDA needs to know of the data."""

from lorica.calibration import preprocess_corda

__all__ = ["preprocess_corda"]
