"""``megatron.bridge.peft.canonical_lora``: adapters on q, k, v, gate and up, each its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorica.compat.megatron_bridge._low_rank import LowRank
from lorica.compat.megatron_bridge.module_matcher import is_linear
from lorica.errors import ConfigError
from lorica.ops import part_names
from lorica.targets.match import meaning
from lorica.targets.walk import bare

#: A projection → the layer that it is fused in.
_FUSED_IN = {
    **dict.fromkeys(("linear_q", "linear_k", "linear_v"), "linear_qkv"),
    **dict.fromkeys(("linear_fc1_up", "linear_fc1_gate"), "linear_fc1"),
}


@dataclass
class CanonicalLoRA(LowRank):
    """Factors for each projection of its own, as Hugging Face's models have them.

    Attributes:
        target_modules: names of projections and modules (``linear_q``, ``linear_fc1_up``, ``linear_proj``); one with
            ``*`` is matched against full names, from beginning to end.
        exclude_modules: with no target modules: all linear layers but these.
        dim: the rank.
        alpha: the numerator of the scale ``alpha / dim``.
        dropout: probability.
        dropout_position: ``"pre"`` on the way into A, ``"post"`` after B, before the scale.
        lora_A_init_method: how A starts: ``xavier``, ``kaiming``, ``normal`` or ``zero``.
        lora_B_init_method: how B starts.
        normalize_moe_lora: experts get the rank ``dim // moe_router_topk``.
        share_expert_adapters: the grouped experts of a layer have one adapter.

    Raises:
        ConfigError: a fused layer is named as such.
    """

    target_modules: list[str] = field(
        default_factory=lambda: [
            *("linear_q", "linear_k", "linear_v", "linear_proj"),
            *("linear_fc1_up", "linear_fc1_gate", "linear_fc2"),
        ]
    )
    normalize_moe_lora: bool = False
    share_expert_adapters: bool = True

    def __post_init__(self) -> None:
        self._map()

    def entries(self) -> list[str] | None:
        """Return the entries that name modules, each with the layer that a projection is fused in."""
        self._map()
        return super().entries()

    def named(self, modules: Mapping[str, nn.Module]) -> set[str]:
        """Return the names of what is adapted: projections, and whole layers that hold none (an MLP without a gate)."""
        mapped = [entry for entry, inside in self.canonical_mapping.items() if inside & _FUSED_IN.keys()]
        meant = meaning(mapped)
        plain = {name for name, module in modules.items() if meant(name) and not part_names(name, bare(module))}
        return {*self.target_modules, *(name for name in plain if is_linear(modules[name]))}

    def lora_fields(self) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` that these mean."""
        return super().lora_fields() | {
            "normalize_moe_lora": self.normalize_moe_lora,
            "share_expert_adapters": self.share_expert_adapters,
        }

    def _map(self) -> None:
        """Write down which modules are meant, and which of the projections in them."""
        self.canonical_mapping.clear()
        for target in self.target_modules or ():
            last = target.rpartition(".")[2].rpartition("*")[2]
            if last in _FUSED_IN.values():
                inside = [name for name, layer in _FUSED_IN.items() if layer == last]
                raise ConfigError(
                    f"CanonicalLoRA adapts the projections in {target!r} one by one: name {inside}, or use LoRA for "
                    "one adapter on all of them"
                )
            layer = _FUSED_IN.get(last, last)
            self.canonical_mapping.setdefault(target.removesuffix(last) + layer, set()).add(last)
