"""peft.tuners.lora.eva: factors that start as the directions in which a layer's inputs vary most."""

from lorica.calibration import get_eva_state_dict, initialize_lora_eva_weights

__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights"]
