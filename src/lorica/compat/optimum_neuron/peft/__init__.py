"""optimum.neuron.peft: adapters on models that are cut over ranks."""

from lorica.compat.optimum_neuron.peft.mapping_func import get_peft_model
from lorica.compat.optimum_neuron.peft.peft_model import NeuronPeftModel, NeuronPeftModelForCausalLM

__all__ = ["NeuronPeftModel", "NeuronPeftModelForCausalLM", "get_peft_model"]
