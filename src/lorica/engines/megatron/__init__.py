"""Megatron-Core: its layers recognised by the names of their classes, described as layouts, and opened.

Nothing of ``megatron.core`` is imported before one of its layers is there.
"""
