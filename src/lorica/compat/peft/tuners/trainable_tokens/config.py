"""peft.tuners.trainable_tokens.config: trained tokens as a method of their own."""

from __future__ import annotations

from typing import Any

from lorica.compat.peft.config import PeftConfig


class TrainableTokensConfig(PeftConfig):
    """Trained tokens without LoRA, which lorica does not have: with it, they are a field of ``LoraConfig``.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "TrainableTokensConfig: lorica trains tokens beside LoRA only; use LoraConfig(trainable_token_indices=…), "
            "or peft for tokens alone"
        )


__all__ = ["TrainableTokensConfig"]
