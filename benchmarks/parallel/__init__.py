"""Training steps on many ranks: what is sent between them, by every way of adapting a layer that is cut."""
