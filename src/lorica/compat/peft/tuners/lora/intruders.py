"""peft.tuners.lora.intruders: directions that fine-tuning put into a weight."""

from lorica.combine import reduce_intruder_dimension

__all__ = ["reduce_intruder_dimension"]
