"""Optimum Neuron's import paths over lorica: ``from lorica.compat.optimum_neuron import NeuronPeftModelForCausalLM``.

Its classes on lorica's own parallel layers, on whatever device torch has. Its packages are not needed.
"""

from lorica.compat.optimum_neuron.models.training import (
    FusedLinearsSpec,
    GQAQKVColumnParallelLinearSpec,
    ModelWeightTransformationSpecs,
    TrainingNeuronConfig,
    consolidate_model_parallel_checkpoints_to_unified_checkpoint,
)
from lorica.compat.optimum_neuron.peft import NeuronPeftModel, NeuronPeftModelForCausalLM, get_peft_model
from lorica.compat.optimum_neuron.peft.tuners import NeuronLoraModel
from lorica.compat.optimum_neuron.peft.tuners.lora import (
    GQAQKVColumnParallelLinear,
    NeuronLoraLayer,
    ParallelEmbedding,
    ParallelLinear,
)

__all__ = [
    "FusedLinearsSpec",
    "GQAQKVColumnParallelLinear",
    "GQAQKVColumnParallelLinearSpec",
    "ModelWeightTransformationSpecs",
    "NeuronLoraLayer",
    "NeuronLoraModel",
    "NeuronPeftModel",
    "NeuronPeftModelForCausalLM",
    "ParallelEmbedding",
    "ParallelLinear",
    "TrainingNeuronConfig",
    "consolidate_model_parallel_checkpoints_to_unified_checkpoint",
    "get_peft_model",
]
