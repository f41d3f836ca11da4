"""optimum.neuron.models.training: how models are cut, and how their weights and files are made whole again."""

from lorica.compat.optimum_neuron.models.training.checkpointing import (
    consolidate_model_parallel_checkpoints,
    consolidate_model_parallel_checkpoints_to_unified_checkpoint,
)
from lorica.compat.optimum_neuron.models.training.config import TrainingNeuronConfig
from lorica.compat.optimum_neuron.models.training.transformations_utils import (
    FusedLinearsSpec,
    GQAQKVColumnParallelLinearSpec,
    ModelWeightTransformationSpec,
    ModelWeightTransformationSpecs,
)

__all__ = [
    "FusedLinearsSpec",
    "GQAQKVColumnParallelLinearSpec",
    "ModelWeightTransformationSpec",
    "ModelWeightTransformationSpecs",
    "TrainingNeuronConfig",
    "consolidate_model_parallel_checkpoints",
    "consolidate_model_parallel_checkpoints_to_unified_checkpoint",
]
