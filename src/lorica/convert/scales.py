"""Scales and alphas: what a configuration gives a layer, and how a number is written that was computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorica.errors import CheckpointError
from lorica.targets.match import pattern_value


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return the scale that a configuration gives a layer of this rank.

    Args:
        config: values of ``adapter_config.json``.
        name: the layer's.
        rank: rows of its A.

    Raises:
        CheckpointError: the configuration does not say, or there is no rank.
    """
    if rank < 1:
        raise CheckpointError(f"{name}: an A without rows is no factor")
    try:
        alpha = float(pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: the configuration has no lora_alpha, so its scale is not known") from error
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def is_close(one: float, other: float) -> bool:
    """Whether two numbers are the same but for how they were computed."""
    return math.isclose(one, other, rel_tol=1e-12)


def plain(value: float) -> int | float:
    """Return a number as one writes it: a whole one where it is that but for how it was computed."""
    nearest = round(value)
    return nearest if is_close(value, nearest) else value


__all__ = ["is_close", "plain", "scale_of"]
