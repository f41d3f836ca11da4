"""What Megatron Bridge's options for mixtures of experts mean for the experts that a model has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorica.errors import ConfigError
from lorica.targets.walk import bare

# Routed experts; every token goes through the shared ones.
_EXPERT = r"mlp\.experts\.(?:local_experts\.\d+\.)?linear_fc[12](?:_gate|_up)?"


def expert_fields(meant: Mapping[str, nn.Module], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``LoraConfig`` for the experts among the modules that are meant.

    Args:
        meant: the modules, by their full names.
        fields: those of the method.

    Raises:
        ConfigError: ranks are to be divided by the experts of a token, and cannot be.
    """
    experts = {name: bare(module) for name, module in meant.items() if re.search(rf"(?:^|\.){_EXPERT}$", name)}
    normalised = bool(experts) and bool(fields.get("normalize_moe_lora"))
    stacked = any(getattr(module, "stack", None) is not None for module in experts.values())
    return {
        "normalize_moe_lora": False,
        "rank_pattern": {_EXPERT: _rank(*next(iter(experts.items())), fields["r"])} if normalised else {},
        "share_expert_adapters": stacked and bool(fields.get("share_expert_adapters")),
    }


def agreed(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a model, given those of each pipeline stage, which may have no experts."""
    return {name: next((each[name] for each in found if each[name]), value) for name, value in found[0].items()}


def _rank(name: str, expert: nn.Module, dim: int) -> int:
    top_k = getattr(getattr(expert, "config", None), "moe_router_topk", None)
    if not isinstance(top_k, int) or top_k <= 0:
        raise ConfigError(
            f"{name}: normalize_moe_lora=True divides dim by moe_router_topk, which is {top_k!r} in the model's "
            "configuration; it has to be a positive number"
        )
    if dim % top_k:
        raise ConfigError(
            f"{name}: normalize_moe_lora=True divides dim={dim} by moe_router_topk={top_k}, of which it is no multiple"
        )
    return dim // top_k
