"""Adapter files: which tensor has which name, reading with suspicion, writing in one step."""
