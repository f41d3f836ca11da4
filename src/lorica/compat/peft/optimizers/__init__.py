"""peft.optimizers: optimisers made for adapters."""

from lorica.optim import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
