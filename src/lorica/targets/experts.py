"""One adapter for all experts of a layer whose weights are stacked (``share_expert_adapters``).

Where a stack is one parameter, its op has one pair of factors. Where an engine shows each expert as a layer of its own,
the layers are tied to the first one here: one pair on each rank, the same on all ranks, whichever experts they have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lorica.config import LoraConfig
from lorica.engines.site import Site
from lorica.errors import TargetError
from lorica.init import find
from lorica.variants import variant_of

if TYPE_CHECKING:
    from lorica.targets.plan import Target

#: What configurations call the number of a layer's experts: Megatron-Core's, and those of transformers.
_NUMBERS = ("num_moe_experts", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def share_among_experts(targets: Sequence[Target], config: LoraConfig, *, elsewhere: bool) -> tuple[Target, ...]:
    """Return the targets with those tied that are layers of one stack, if the configuration shares adapters.

    Args:
        targets: all of them, with their sites.
        config: the configuration.
        elsewhere: whether stacks may lie on other ranks.

    Raises:
        TargetError: no target is one of a stack, or the adapter's start or variant looks at each weight.
    """
    if not config.share_expert_adapters:
        return tuple(targets)
    if not any(_stack(target) or "expert" in target.op.roles_weight for target in targets) and not elsewhere:
        raise TargetError(
            "share_expert_adapters=True: no target is a stack of experts (target_parameters), or a layer of one"
        )
    sources: dict[int, str] = {}
    kept, tied = [], []
    for target in targets:
        if (stack := _stack(target)) is None:
            kept.append(target)
            continue
        _check(target, config)
        shared = replace(target, site=_everywhere(target.site), seed_name=_first(target.name))
        if id(stack) in sources:
            tied.append(replace(shared, tied_to=sources[id(stack)]))
        else:
            sources[id(stack)] = target.name
            kept.append(shared)
    return (*kept, *tied)


def has_experts(model: nn.Module) -> bool:
    """Whether a model, of which this rank has a stage, is configured to have experts on one of its stages."""
    configs = [getattr(part, "config", None) for part in (model, *model.children())]
    return any(getattr(config, name, None) for config in configs for name in _NUMBERS)


def _stack(target: Target) -> Any:
    """Return the stack that a target's layer is one of."""
    return getattr(target.base, "stack", None)


def _first(name: str) -> str:
    """Return the name of the first expert's layer, given that of any expert's."""
    return re.sub(r"\.\d+(?=\.[^.]+$)", ".0", name)


def _everywhere(site: Site | None) -> Site | None:
    """Return the site of factors that the ranks share which have other experts: each sees the tokens of its own."""
    if site is None:
        return None
    layout = replace(site.layout, sequence=(*site.layout.sequence, *site.apart))
    return replace(site, layout=layout)


def _check(target: Target, config: LoraConfig) -> None:
    init = find(config.init_lora_weights)
    looks = init is not None and (init.subtracts or init.needs or init.leaves is not None)
    if looks or variant_of(config):
        what = variant_of(config) or f"init_lora_weights={config.init_lora_weights!r}"
        raise TargetError(
            f"{target.name}: share_expert_adapters=True gives all experts one pair of factors, and {what} looks at "
            "each expert's own weight; leave one of the two out"
        )
