"""optimum.neuron.peft.mapping_func: ``get_peft_model``."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.compat import peft
from lorica.compat.optimum_neuron.peft.peft_model import NeuronPeftModel
from lorica.compat.peft.mapping_func import about_to_adapt
from lorica.config import TaskType
from lorica.engines.registry import described


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> peft.PeftModel:
    """Adapt ``model`` in place and return it wrapped; see :func:`lorica.get_peft_model` for the arguments.

    A model that is cut becomes a :class:`NeuronPeftModel` (of causal language modelling a
    :class:`NeuronPeftModelForCausalLM`), any other one what :func:`lorica.compat.peft.get_peft_model` makes of it.

    Raises:
        TargetError: the configuration does not fit the model. The model is then as it was.
        NotImplementedError: ``mixed`` is true.
    """
    if mixed or not is_cut(model):
        return peft.get_peft_model(
            model, peft_config, adapter_name, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage
        )
    about_to_adapt(model, peft_config, revision)
    task = peft_config.task_type
    cls: Any = NeuronPeftModel if task is None else NeuronPeftModel.by_task[TaskType(task)]
    made: peft.PeftModel = cls(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    return made


def is_cut(model: nn.Module) -> bool:
    """Whether a model lies over ranks, or has layers that can."""
    return hasattr(model, "lorica_mesh") or any(described(module) is not None for module in model.modules())


__all__ = ["get_peft_model", "is_cut"]
