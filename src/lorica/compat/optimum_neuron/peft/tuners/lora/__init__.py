"""optimum.neuron.peft.tuners.lora: LoRA."""

from lorica.compat.optimum_neuron.peft.tuners.lora.layer import (
    GQAQKVColumnParallelLinear,
    NeuronLoraLayer,
    ParallelEmbedding,
    ParallelLinear,
)
from lorica.compat.optimum_neuron.peft.tuners.lora.model import NeuronLoraModel

__all__ = ["GQAQKVColumnParallelLinear", "NeuronLoraLayer", "NeuronLoraModel", "ParallelEmbedding", "ParallelLinear"]
