"""peft.optimizers."""
