"""Adapters as data: several made one, any made plain LoRA, and what they do to the directions of a weight."""

from lorica.combine.weighted import TYPES, add_weighted_adapter

__all__ = ["TYPES", "add_weighted_adapter"]
