"""peft.tuners.trainable_tokens: in lorica a field of ``LoraConfig``, ``trainable_token_indices``."""

from lorica.compat.peft.tuners.trainable_tokens.config import TrainableTokensConfig
from lorica.compat.peft.tuners.trainable_tokens.layer import TrainableTokensLayer

__all__ = ["TrainableTokensConfig", "TrainableTokensLayer"]
