"""From an adapter whose start was taken out of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA …) to plain LoRA.

Such an adapter trains ``W₀ + s·B·A`` with ``W₀ = W - s·B₀·A₀``. For the weight ``W`` that everybody has, its delta is
``s·(B·A - B₀·A₀)``: the product of ``[B, -B₀]`` and ``[A; A₀]``, exact, of twice the rank.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt.inject import base_of
from lorica.checkpoint import reading
from lorica.checkpoint.bulk import read_all
from lorica.checkpoint.names import adapter_entries, config_of_adapter
from lorica.checkpoint.saving import get_peft_model_state_dict
from lorica.combine.place import replace_config
from lorica.config import LoraConfig
from lorica.engines.stages import axis_of_stages
from lorica.engines.together import together
from lorica.errors import AdapterError, CheckpointError
from lorica.layout import Roles
from lorica.variants import VARIANTS, Variant, variant_of

Converted = tuple[dict[str, Tensor], LoraConfig]
_STARTS = ("pissa", "corda", "olora", "lora_ga", "true")


class Kind(NamedTuple):
    """What is to be known of a tensor in a file to put another one beside it.

    Attributes:
        roles: role of each dimension of the live tensor.
        experts: its first size.
    """

    roles: Roles
    experts: int


def kinds_of(model: nn.Module, adapter: str) -> dict[str, Kind]:
    """Return name in a file → kind, for the factors of an adapter on all stages of a pipeline; all of them call."""
    entries = adapter_entries(model, adapter, config_of_adapter(model, adapter))
    mine = {
        name: Kind(entry.roles, entry.whole_shape[0])
        for name, entry in entries.items()
        if "rank" in entry.roles and (entry.owner is not None or entry.tied)
    }
    axis = axis_of_stages(base_of(model))
    if axis is None:
        return mine
    found: list[Any] = [None] * axis.size
    dist.all_gather_object(found, mine, group=axis.group)
    return {name: kind for there in found for name, kind in there.items()}


def without_start(
    trained: Mapping[str, Tensor], initial: Mapping[str, Tensor], kinds: Mapping[str, Kind]
) -> dict[str, Tensor]:
    """Return the tensors of the plain LoRA that an adapter amounts to, from those of its end and of its start.

    What is no factor (biases, magnitudes, whole modules) stays as it was trained.

    Args:
        trained: name in a file → tensor.
        initial: the same of the adapter before it was trained; more names are no harm.
        kinds: which are factors.

    Raises:
        CheckpointError: a factor is missing from ``initial``, or has another shape there.
    """
    result = {}
    for name, tensor in trained.items():
        if name not in kinds:
            result[name] = tensor
            continue
        if name not in initial or initial[name].shape != tensor.shape:
            found = tuple(initial[name].shape) if name in initial else "nothing"
            raise CheckpointError(f"the initial adapter has {found} for {name}, the trained one {tuple(tensor.shape)}")
        start = initial[name].to(tensor)
        result[name] = _beside(tensor, -start if _is_b(kinds[name]) else start, kinds[name], _groups(name, trained))
    return result


def _is_b(kind: Kind) -> bool:
    return "out" in kind.roles


def _groups(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Return in how many groups the rows of a kernel's A belong to rows of B; 1 for all but grouped convolutions."""
    if not name.endswith("lora_A.weight") or tensors[name].dim() < 3:
        return 1
    return tensors[name].shape[0] // tensors[name.removesuffix("A.weight") + "B.weight"].shape[1]


def _beside(one: Tensor, other: Tensor, kind: Kind, groups: int) -> Tensor:
    """Return two tensors as one of twice the rank."""
    if "expert" in kind.roles:  # two dimensions in a file, see lorica.checkpoint.forms
        if _is_b(kind):
            parts = [side.view(side.shape[0], -1, kind.experts) for side in (one, other)]
            return torch.cat(parts, 1).flatten(1)
        parts = [side.view(kind.experts, -1, side.shape[1]) for side in (one, other)]
        return torch.cat(parts, 1).flatten(0, 1)
    if _is_b(kind):
        return torch.cat([one, other], 1)
    parts = [side.view(groups, -1, *side.shape[1:]) for side in (one, other)]
    return torch.cat(parts, 1).flatten(0, 1)


def check_variant(config: LoraConfig) -> None:
    """Refuse a variant whose delta is another product than that of its factors.

    Raises:
        AdapterError: names the field.
    """
    field = variant_of(config)
    if type(VARIANTS[field]).plain is not Variant.plain:
        raise AdapterError(
            f"{field}: the delta is more than B·A, so that the start cannot be put beside its factors; convert_to_lora "
            "finds plain LoRA that is near"
        )


def config_without_start(config: LoraConfig) -> LoraConfig:
    """Return the configuration of twice the rank and the same scales."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace_config(
        config,
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
        eva_config=None,
        loftq_config={},
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()},
    )


def read_initial(path: str | os.PathLike[str], config: LoraConfig) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter that was not trained yet.

    Raises:
        CheckpointError: there is none.
    """
    if not str(config.init_lora_weights).lower().startswith(_STARTS):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA adapter "
            "to a LoRA adapter",
            stacklevel=4,
        )
    return read_all(reading.open_weights(path))


def subtract_mutated_init(
    model: nn.Module, trained: Mapping[str, Tensor], initial_adapter: str, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the factors of :func:`without_start`, where the adapter of the start is in the model too.

    Args:
        model: an adapted model.
        trained: name in a file → tensor.
        initial_adapter: name of the adapter of the start.
        state_dict: live tensors to take its values from.
    """
    check_variant(config_of_adapter(model, initial_adapter))
    kinds = kinds_of(model, initial_adapter)
    initial = get_peft_model_state_dict(model, state_dict, initial_adapter, save_embedding_layers=False)
    if not trained and not initial:
        return {}  # on another rank than the first
    # Names in a file begin with "base_model.", the way from the PeftModel to this one.
    short = {name: name if name in kinds else name.partition(".")[2] for name in trained}
    factors = {short[name]: tensor for name, tensor in trained.items() if short[name] in kinds}
    found = without_start(factors, initial, kinds)
    return {name: found[short[name]] for name in trained if short[name] in found}


def converter(model: nn.Module, path: str | os.PathLike[str]) -> Callable[[str, dict[str, Tensor]], Converted]:
    """Return what turns the tensors and the configuration of an adapter into those of plain LoRA while it is saved.

    Args:
        model: an adapted model.
        path: directory of the adapter as it was before it was trained.
    """

    def convert(adapter: str, trained: dict[str, Tensor]) -> Converted:
        config = config_of_adapter(model, adapter)
        check_variant(config)
        kinds = kinds_of(model, adapter)
        with together(base_of(model), f"converting {adapter!r}"):
            initial = read_initial(path, config)
            if trained:
                trained = without_start(trained, initial, kinds)
        return trained, config_without_start(config)

    return convert


__all__ = [
    "Kind",
    "config_without_start",
    "converter",
    "kinds_of",
    "read_initial",
    "subtract_mutated_init",
    "without_start",
]
