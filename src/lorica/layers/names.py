"""What the tensors of an adapter are called below an adapted layer: live, and in a file."""

from __future__ import annotations

import functools

from lorica.ops import Op

_LOOKUP_NAMES, _PRODUCT_NAMES = ("lora_embedding_A", "lora_embedding_B"), ("lora_A", "lora_B")


def container_names(op: Op) -> tuple[str, str]:
    """Return the names of what holds the factors A, and B, of all adapters of a layer."""
    return _LOOKUP_NAMES if op.lookup else _PRODUCT_NAMES


@functools.lru_cache(maxsize=256)
def plain_names(lookup: bool, bias: bool, adapter: str) -> dict[str, str]:
    """Return name in a file → live name of an adapter's factors without extras; there are many layers, and few such
    tables."""
    first, second = _LOOKUP_NAMES if lookup else _PRODUCT_NAMES
    if lookup:
        names = {first: f"{first}.{adapter}", second: f"{second}.{adapter}"}
    else:
        names = {f"{first}.weight": f"{first}.{adapter}.weight", f"{second}.weight": f"{second}.{adapter}.weight"}
    if bias:
        names[f"{second}.bias"] = f"{second}.{adapter}.bias"
    return names


__all__ = ["container_names", "plain_names"]
