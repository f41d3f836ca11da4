"""peft.tuners.lora.arrow: tokens that find their own way through a set of adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lorica import model as core
from lorica.config import ArrowConfig

if TYPE_CHECKING:
    from lorica.compat.peft.peft_model import PeftModel


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters into a model and a router over them, which is active; see :func:`lorica.create_arrow_model`."""
    from lorica.compat.peft.peft_model import PeftModel  # which imports this package

    made = core.create_arrow_model(
        base_model,
        task_specific_adapter_paths,
        arrow_config,
        general_adapter_paths,
        model_class=PeftModel,
        **adapter_kwargs,
    )
    assert isinstance(made, PeftModel)
    return made


__all__ = ["create_arrow_model"]
