"""peft.tuners.trainable_tokens.layer: rows of an embedding that train for a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lorica.compat.peft._library import beneath
from lorica.compat.peft.tuners.tuners_utils import BaseTunerLayer
from lorica.layers import TrainableTokensLayer as Core


class TrainableTokensLayer(
    BaseTunerLayer,
    Core,
    *beneath("tuners.trainable_tokens.layer.TrainableTokensLayer"),  # type: ignore[misc]
):
    """The trained rows of one module; see :class:`lorica.layers.TrainableTokensLayer`."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta",)
    other_param_names: ClassVar[tuple[str, ...]] = ("token_indices",)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the rows of the named adapters train, or freeze them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.trainable_tokens_delta:
                self.trainable_tokens_delta[name].requires_grad_(requires_grad)

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """Return a copy of the weight with the rows of the active adapters in place."""
        del active_adapters
        return self.effective_weight()

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_indices)

    def _forget(self, adapter_name: str) -> None:
        self.remove_adapter(adapter_name)


__all__ = ["TrainableTokensLayer"]
