"""peft.tuners.lora.model: ``LoraModel``, the adapters in a base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lorica.compat.peft._library import beneath
from lorica.compat.peft.config import ours
from lorica.compat.peft.tuners.lora.layer import LoraLayer, adopt
from lorica.compat.peft.tuners.tuners_utils import BaseTuner
from lorica.config import LoraConfig
from lorica.model import LoraModel as Core
from lorica.targets.defaults import DEFAULT_TARGETS

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = DEFAULT_TARGETS


class LoraModel(BaseTuner, Core, *beneath("LoraModel")):  # type: ignore[misc]
    """Adapters in a base model, changed in place; see :class:`lorica.LoraModel`.

    Args:
        model: the model to adapt.
        config: the configuration of the first adapter, or a dictionary that gives it under the adapter's name.
        adapter_name: its name.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.
        state_dict: tensors of an adapter, whose names say which layers are adapted.
        autocast_adapter_dtype: give 16-bit base weights float32 factors.
    """

    tuner_layer_cls: ClassVar[type[LoraLayer]] = LoraLayer
    target_module_mapping: ClassVar[dict[str, list[str] | str]] = DEFAULT_TARGETS

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = False,
    ) -> None:
        chosen = config[adapter_name] if isinstance(config, dict) else config
        super().__init__(
            model,
            ours(chosen),
            adapter_name,
            low_cpu_mem_usage,
            state_dict,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = False,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put a further adapter in; see :meth:`lorica.LoraModel.add_adapter`."""
        super().add_adapter(
            adapter_name,
            ours(peft_config),
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            state_dict=state_dict,
        )
        adopt(self.model)


__all__ = ["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "LoraModel"]
