"""The embedding whose weight is the output layer's too.

On one stage the output layer has no weight: the model hands it the embedding's. On several, the first and the last
stage have a copy each. Either way nothing can be merged into one of the two layers alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.engines.megatron.models import chunks_of, inside_adapters
from lorica.engines.registry import lend

_MARK = "lorica_tied"


def tell_tied(model: nn.Module) -> None:
    """Tell the embedding and the output layer of a model that they share their weight, if they do.

    Args:
        model: the base model, or the list of its chunks.
    """
    for chunk in chunks_of(model):
        found: Any = chunk
        if not getattr(found, "share_embeddings_and_output_weights", False):
            continue
        embedding = inside_adapters(getattr(getattr(found, "embedding", None), "word_embeddings", None))
        output = inside_adapters(getattr(found, "output_layer", None))
        for layer in (embedding, output):
            if layer is not None:
                layer.__dict__[_MARK] = True
        if embedding is not None and output is not None and output.weight is None:
            lend(embedding, output)


def unmergeable(module: nn.Module) -> str:
    """Return why nothing may be merged into a layer's weight; empty: it may."""
    if _MARK in module.__dict__:
        return "the embedding and the output layer share this weight, and a merge would change both"
    return ""


__all__ = ["tell_tied", "unmergeable"]
