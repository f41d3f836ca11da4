"""What Megatron Bridge's options for mixtures of experts mean for the experts that a model has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

# Routed experts; every token goes through the shared ones.
_EXPERT = re.compile(r"(?:^|.*\.)mlp\.experts\.(?:.*\.)?linear_fc[12]$")


def expert_fields(meant: Mapping[str, nn.Module], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``LoraConfig`` for the experts among the modules that are meant.

    Args:
        meant: the modules, by their full names.
        fields: those of the method.
    """
    experts = [name for name in meant if _EXPERT.match(name)]
    grouped = any(".local_experts." not in name for name in experts)
    return {
        "normalize_moe_lora": bool(experts) and bool(fields.get("normalize_moe_lora")),
        "share_expert_adapters": grouped and bool(fields.get("share_expert_adapters")),
    }
