"""``megatron.bridge.peft.dora``: weights as magnitude and direction (https://arxiv.org/abs/2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lorica.compat.megatron_bridge._low_rank import LowRank, init_of
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

    dim: int = 32
    alpha: int = 64
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"

    def __post_init__(self) -> None:
        if self.dropout_position != "pre":
            raise ConfigError(
                f"DoRA(dropout_position={self.dropout_position!r}): its output is a product of a weight and the whole "
                "input, so there is nothing to drop after it; use 'pre'"
            )

    def lora_fields(self) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` that these mean."""
        return {
            "r": self.dim,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "init_lora_weights": init_of(self.lora_A_init_method, self.lora_B_init_method),
            "use_dora": True,
            "fused_as_one": True,
        }
