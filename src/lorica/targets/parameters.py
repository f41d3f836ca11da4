"""Bare parameters that an adapter is put on (``target_parameters``): matrices, and the stacked weights of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError, suggest
from lorica.targets.match import entry_matches
from lorica.targets.walk import bare

#: How model configurations call the number of experts that a token is sent to.
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "moe_top_k",
    "moe_router_topk",
    "top_k",
)


class Found(NamedTuple):
    """A parameter that is meant: the name and the module of its owner, and its own name there."""

    owner: str
    module: nn.Module
    name: str

    @property
    def key(self) -> str:
        """Its full name."""
        return f"{self.owner}.{self.name}"


def find_parameters(modules: Mapping[str, nn.Module], entries: list[str]) -> list[Found]:
    """Return the parameters that ``target_parameters`` means, in the order of the model.

    Args:
        modules: what is walked, by its names in the base model.
        entries: each means a full name, or an end of one after a dot; one with ``*`` is matched against whole names.

    Raises:
        TargetError: an entry matches nothing, or a parameter of the model itself, which no module stands around, or
            one that a kernel reads without asking the module that holds it.
    """
    everything = list(_parameters(modules))
    found: list[Found] = []
    for entry in sorted(set(entries)):
        meant = [parameter for parameter in everything if entry_matches(entry, parameter.key.removeprefix("."))]
        if not meant:
            names = dict.fromkeys([*(p.name for p in everything), *(p.key for p in everything)])
            raise TargetError(f"target_parameters: no parameter is named {entry!r}.{suggest(entry, names)}")
        found += meant
    for parameter in found:
        if not parameter.owner:
            raise TargetError(
                f"target_parameters: {parameter.name!r} is a parameter of the model itself; only parameters of the "
                "modules inside it can be adapted"
            )
        _check_that_it_is_asked(modules, parameter)
    chosen = {parameter.key for parameter in found}
    return [parameter for parameter in everything if parameter.key in chosen]


def _check_that_it_is_asked(modules: Mapping[str, nn.Module], parameter: Found) -> None:
    around = modules[parameter.owner.rpartition(".")[0]]
    if getattr(modules[""], "use_kernels", False) and hasattr(type(around), "kernel_layer_name"):
        raise TargetError(
            f"{parameter.key}: with use_kernels=True {type(around).__name__} runs a kernel that reads this parameter "
            "by itself, so an adapter on it would have no effect; load the model without kernels"
        )


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[Found]:
    for owner, module in modules.items():
        plain = bare(module)
        for name, parameter in plain._parameters.items():
            if parameter is not None:
                yield Found(owner, plain, name)


def experts_per_token(config: Any) -> int | None:
    """Return to how many experts a token is sent, where a model's configuration says so."""
    counts = (getattr(config, name, None) for name in _TOP_K)
    return next((count for count in counts if isinstance(count, int) and count > 0), None)


def spec_per_expert(spec: AdapterSpec, found: Found) -> AdapterSpec:
    """Return the spec with the rank that leaves a token as many directions as a dense layer (``normalize_moe_lora``).

    Raises:
        TargetError: the model does not say to how many experts a token is sent, or that number does not divide ``r``.
    """
    top_k = experts_per_token(getattr(found.module, "config", None))
    if top_k is None:
        raise TargetError(
            f"{found.key}: normalize_moe_lora=True divides the rank by the number of experts that a token is sent to, "
            f"and the module's configuration has none of {', '.join(_TOP_K)}"
        )
    r = spec.r
    if r % top_k:
        raise TargetError(
            f"{found.key}: normalize_moe_lora=True divides the rank by the {top_k} experts that a token is sent to, "
            f"and r={r} is not a multiple of it"
        )
    return replace(spec, r=r // top_k, scaling=AdapterSpec.scale(r // top_k, spec.alpha, rslora=spec.rslora))
