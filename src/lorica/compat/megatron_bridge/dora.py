"""``megatron.bridge.peft.dora``: weights as magnitude and direction (https://arxiv.org/abs/2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorica.compat.megatron_bridge._low_rank import LowRank
from lorica.errors import ConfigError


@dataclass
class DoRA(LowRank):
    """DoRA, with norms over whole rows of the weight, wherever its columns lie.

    Attributes:
        target_modules: names of modules; one with ``*`` is matched against full names, from beginning to end.
        exclude_modules: with no target modules: all linear layers but these.
        dim: the rank.
        alpha: the numerator of the scale ``alpha / dim``.
        dropout: probability.
        dropout_position: ``"pre"``, the only one.
        lora_A_init_method: how A starts: ``xavier``, ``kaiming``, ``normal`` or ``zero``.
        lora_B_init_method: how B starts.

    Raises:
        ConfigError: ``dropout_position`` is another.
    """

    alpha: int = 64

    def __post_init__(self) -> None:
        if self.dropout_position != "pre":
            raise ConfigError(
                f"DoRA(dropout_position={self.dropout_position!r}): its output is a product of a weight and the whole "
                "input, so there is nothing to drop after it; use 'pre'"
            )

    def lora_fields(self) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` that these mean."""
        return super().lora_fields() | {"use_dora": True, "fused_as_one": True}
