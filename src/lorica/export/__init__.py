"""Adapters in the form that other loaders take: PEFT, vLLM, SGLang."""

from lorica.export.write import TARGETS, export_adapter

__all__ = ["TARGETS", "export_adapter"]
