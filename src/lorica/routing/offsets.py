"""Where in a row an activated adapter (aLoRA, https://arxiv.org/abs/2504.12397) begins: at its invocation sequence.

An offset counts tokens from the end of the row back to the *start* of the last occurrence. So it is at least the length
of the sequence, and stays what it is while a cache holds the tokens before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica.routing.rows import BASE


def last_occurrence(input_ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return for each row how many tokens there are from the last occurrence of ``tokens`` to the end; 0: none.

    Args:
        input_ids: ``[rows, length]``.
        tokens: what is looked for.
    """
    rows, length = input_ids.shape
    if not tokens or length < len(tokens):
        return input_ids.new_zeros(rows, dtype=torch.long)
    wanted = torch.tensor(list(tokens), dtype=input_ids.dtype, device=input_ids.device)
    found = (input_ids.unfold(1, len(tokens), 1) == wanted).all(-1)
    left = torch.arange(length, len(tokens) - 1, -1, device=input_ids.device)  # tokens from each start to the end
    return torch.where(found, left, length + 1).amin(1).remainder(length + 1)


def calculate_alora_offsets(
    peft_config: Mapping[str, Any],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """Return each row's offset, or None where its adapter is not activated in it or needs no invocation.

    Args:
        peft_config: adapter → configuration.
        active_adapter: the adapter of rows that ``adapter_names`` does not name.
        input_ids: ``[rows, length]``; None: no rows.
        adapter_names: one for each row.
    """
    if input_ids is None:
        return []
    found: list[int | None] = [None] * len(input_ids)
    for name, rows in _rows_by_adapter(active_adapter, len(input_ids), adapter_names).items():
        if name == BASE:
            continue
        if name not in peft_config:
            for row in rows:
                warnings.warn(
                    f"Adapter '{name}' not found in peft_config. Using base model for row {row}.", stacklevel=2
                )
            continue
        tokens = getattr(peft_config[name], "alora_invocation_tokens", None)
        if tokens:
            for row, offset in zip(rows, last_occurrence(input_ids[rows], tokens).tolist(), strict=True):
                found[row] = offset or None
    return found


def _rows_by_adapter(active: str, count: int, names: Sequence[str] | None) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for row in range(count):
        grouped.setdefault(names[row] if names and row < len(names) else active, []).append(row)
    return grouped


def get_alora_offsets_for_forward(
    model: nn.Module, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Return the keyword arguments of a forward with ``alora_offsets`` among them, if its batch has an aLoRA.

    Args:
        model: has ``peft_config``, ``active_peft_config`` and ``active_adapter``.
        input_ids: ``[rows, length]``.
        inputs_embeds: given in their place; then there is nothing to look in.
        kwargs: of the forward; ``alora_offsets`` that are given stay.
    """
    if not _has_alora(model, kwargs.get("adapter_names")) or kwargs.get("alora_offsets") is not None:
        return kwargs
    if input_ids is None and inputs_embeds is not None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=2,
        )
    return {**kwargs, "alora_offsets": _offsets(model, input_ids, kwargs)}


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the keyword arguments of ``generate`` with ``alora_offsets`` among them, if its batch has an aLoRA.

    Args:
        model: has ``peft_config``, ``active_peft_config`` and ``active_adapter``.
        args: of ``generate``; the first may be the prompts.
        kwargs: of ``generate``; ``alora_offsets`` that are given stay.
    """
    if not _has_alora(model, kwargs.get("adapter_names")) or kwargs.get("alora_offsets") is not None:
        return kwargs
    input_ids = kwargs.get("input_ids")
    if input_ids is None and args and isinstance(args[0], Tensor):
        input_ids = args[0]
    if input_ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA.",
            stacklevel=2,
        )
    elif input_ids.ndim == 1:
        input_ids = input_ids.unsqueeze(0)
    return {**kwargs, "alora_offsets": _offsets(model, input_ids, kwargs)}


def _offsets(model: Any, input_ids: Tensor | None, kwargs: Mapping[str, Any]) -> list[int | None] | None:
    if input_ids is None:
        return None
    names = kwargs.get("adapter_names")
    return calculate_alora_offsets(model.peft_config, model.active_adapter, input_ids, adapter_names=names)


def _has_alora(model: Any, names: Sequence[str] | None) -> bool:
    configs = [model.active_peft_config, *(model.peft_config.get(name) for name in names or ())]
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


__all__ = [
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "last_occurrence",
]
