"""peft.utils.quantization_utils: quantised base weights. In lorica these are :mod:`lorica.storage`'s."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lorica.errors import AdapterError
from lorica.storage import Packed, stored_weight, write_values


class QuantizationBackend:
    """The base weight of a quantised layer as plain numbers. All kinds share lorica's storages."""

    supports_merge: ClassVar[bool] = True
    backend_name: ClassVar[str] = ""
    layer_type: ClassVar[str] = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """Return the weight's values, float32.

        Raises:
            AdapterError: the layer's weight is not quantised.
        """
        return _packed(base_layer).dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantise values and write them over the weight of the base layer of ``peft_layer``.

        Raises:
            AdapterError: the layer's weight is not quantised, or its form cannot be written.
        """
        base = peft_layer.get_base_layer() if hasattr(peft_layer, "get_base_layer") else peft_layer
        write_values(_packed(base), weight_data.float())


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes' 8-bit rows."""

    backend_name: ClassVar[str] = "bnb 8bit"


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes' 4-bit blocks."""

    backend_name: ClassVar[str] = "bnb 4bit"


def _packed(base_layer: nn.Module) -> Packed:
    stored = stored_weight(base_layer, "weight")
    if not isinstance(stored, Packed):
        raise AdapterError(f"{type(base_layer).__name__}: its weight is stored as plain numbers ({stored.dtype})")
    return stored


__all__ = ["Bnb4bitBackend", "Bnb8bitBackend", "QuantizationBackend"]
