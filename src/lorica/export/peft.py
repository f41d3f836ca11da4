"""PEFT: the files that lorica writes, less what only lorica knows.

``share_expert_adapters`` and ``normalize_moe_lora`` are no fields of PEFT's: it would read a file with them as an
adapter of other shapes. Written out, the first is a copy of the pair for each expert and the second a ``rank_pattern``.
Source: peft 0.21.2, ``peft/tuners/lora/layer.py`` (``ParamWrapper``) and ``peft/config.py`` (fields it does not know).
"""

from __future__ import annotations

import copy
import re

from torch import Tensor

from lorica.checkpoint import reading
from lorica.checkpoint.bulk import read_all
from lorica.checkpoint.forms import FORMS
from lorica.config import LoraConfig
from lorica.export.pairs import stacked
from lorica.export.saved import Saved
from lorica.export.source import Exported, Source

_NOTES = {
    "dropout_position": "PEFT drops before A only: going on with training there is not the same",
    "a2a_experimental": "PEFT has no a2a_experimental; it changes nothing on one process",
}


def export(source: Source) -> Exported:
    """Return an adapter as PEFT reads it."""
    config = copy.copy(source.config)
    tensors = read_all(reading.open_weights(source.path))
    notes = [note for name, note in _NOTES.items() if getattr(config, name) != getattr(LoraConfig(), name)]
    if config.share_expert_adapters or config.normalize_moe_lora:
        saved = source.saved
        if config.normalize_moe_lora:
            config.rank_pattern = _ranks(saved) | (config.rank_pattern or {})
        if config.share_expert_adapters:
            tensors = {name: _each(name, tensor, saved) for name, tensor in tensors.items()}
            notes.append("PEFT has no share_expert_adapters: every expert has a copy, which would train apart there")
    for name in LoraConfig._own_fields:
        setattr(config, name, getattr(LoraConfig(), name))
    return Exported(tensors, config, notes)


def _ranks(saved: Saved) -> dict[str, int]:
    return {re.escape(weight.name): weight.spec.r for weight in saved.weights if weight.experts}


def _each(name: str, tensor: Tensor, saved: Saved) -> Tensor:
    weight = next((weight for weight in saved.weights if weight.experts and name in weight.keys), None)
    if weight is None:
        return tensor
    a, b = stacked(weight)
    is_a = ".lora_A." in name
    form = FORMS["expert", "rank", "in"] if is_a else FORMS["expert", "out", "rank"]
    return form.saved(a if is_a else b).contiguous()
