"""optimum.neuron.peft.tuners: what holds adapters."""

from lorica.compat.optimum_neuron.peft.tuners.lora import NeuronLoraModel

__all__ = ["NeuronLoraModel"]
