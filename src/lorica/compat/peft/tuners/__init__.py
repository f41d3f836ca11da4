"""peft.tuners."""
