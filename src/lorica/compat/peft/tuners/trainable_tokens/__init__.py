"""peft.tuners.trainable_tokens."""
