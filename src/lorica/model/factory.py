"""The two ways to adapt a model: with a wrapper around it, or in place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from lorica.config import LoraConfig, TaskType
from lorica.model.lora_model import LoraModel
from lorica.model.peft_model import PeftModel


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt ``model`` in place and return it wrapped.

    Args:
        model: the base model.
        peft_config: the configuration; it is copied.
        adapter_name: the adapter's name.
        mixed: adapters of several methods; there is only LoRA here.
        autocast_adapter_dtype: give 16-bit base weights float32 factors.
        revision: the revision of the base model, to be written into the configuration.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.

    Raises:
        TargetError: the configuration does not fit the model. The model is then as it was.
        NotImplementedError: ``mixed`` is true.
    """
    if mixed:
        raise NotImplementedError("mixed=True: lorica adapts by LoRA only, so there is nothing to mix")
    if getattr(model, "peft_config", None):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    cls = PeftModel if peft_config.task_type is None else PeftModel.by_task[TaskType(peft_config.task_type)]
    wrapped = cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    if revision is not None:
        wrapped.peft_config[adapter_name].revision = revision
    return wrapped


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt ``model`` in place and return it, without a wrapper.

    Args:
        peft_config: the configuration; it is copied.
        model: the base model.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.
        state_dict: tensors of an adapter, whose names say which layers are adapted, instead of the configuration.

    Raises:
        TargetError: the configuration does not fit the model. The model is then as it was.
    """
    LoraModel(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
    return model
