"""optimum.neuron.peft.tuners.lora.model: ``NeuronLoraModel``, the adapters in a cut model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lorica.compat.optimum_neuron.peft.start import one_start
from lorica.compat.optimum_neuron.peft.tuners.lora.layer import NeuronLoraLayer, adopt
from lorica.compat.peft import LoraModel
from lorica.compat.peft.tuners.lora.layer import LoraLayer


class NeuronLoraModel(LoraModel):
    """Adapters in a base model, changed in place; see :class:`lorica.LoraModel`.

    Args:
        model: the model to adapt: cut by :func:`lorica.parallel.parallelize`, of lorica's parallel layers, or whole.
        config: the configuration of the first adapter, or a dictionary that gives it under the adapter's name.
        adapter_name: its name.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.
        autocast_adapter_dtype: give 16-bit base weights float32 factors.
    """

    tuner_layer_cls: ClassVar[type[LoraLayer]] = NeuronLoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        *,
        autocast_adapter_dtype: bool = False,
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = False,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put a further adapter in, the same on all ranks; see :meth:`lorica.LoraModel.add_adapter`."""
        with one_start(self.model):
            super().add_adapter(
                adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, state_dict=state_dict
            )
        adopt(self.model)


__all__ = ["NeuronLoraModel"]
