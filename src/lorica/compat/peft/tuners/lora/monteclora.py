"""peft.tuners.lora.monteclora: the noise of MonteCLoRA, which in lorica is drawn by the variant."""

from __future__ import annotations

from typing import Any

from torch import nn


class MontecloraSampler(nn.Module):
    """Buffered noise for one layer, which lorica does not have: its variant draws what a forward needs.

    What such a module learns is below the layer under PEFT's names (``lora_monteclora_sampler``).

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        raise NotImplementedError(
            "MontecloraSampler: lorica draws the noise of MonteCLoRA in the forward and keeps no buffer of it; use "
            "LoraConfig(monteclora_config=MontecloraConfig(…))"
        )


__all__ = ["MontecloraSampler"]
