"""peft.mapping_func: ``get_peft_model``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lorica.adapt.inject import switch_of
from lorica.compat.peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from lorica.compat.peft.mixed_model import PeftMixedModel
from lorica.compat.peft.peft_model import PeftModel, warn_of_name


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt ``model`` in place and return it wrapped; see :func:`lorica.get_peft_model` for the arguments.

    ``peft_config`` may be a configuration of this package, of lorica or of peft. As with PEFT, the base model's name
    and the revision are written into it.

    Raises:
        TargetError: the configuration does not fit the model. The model is then as it was.
        NotImplementedError: ``mixed`` is true.
    """
    about_to_adapt(model, peft_config, revision)
    warn_of_name(adapter_name)
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return cls(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def about_to_adapt(model: nn.Module, peft_config: Any, revision: str | None) -> None:
    """Write the base model's name and the revision into a configuration, and warn as PEFT does.

    Args:
        model: the model to adapt.
        peft_config: is changed.
        revision: of the base model; None: the configuration's.
    """
    before, found = peft_config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    peft_config.base_model_name_or_path = found
    if switch_of(model) is not None:
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=3,
        )
    if before is not None and before != found:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{found}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with "
                f"revision {revision}",
                stacklevel=3,
            )
        peft_config.revision = revision


__all__ = ["about_to_adapt", "get_peft_model"]
