"""Making an adapter plain LoRA before it is exported: a variant by its nearest factors, a start by what came after."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from lorica.combine import save_as_lora
from lorica.errors import ExportError
from lorica.export.saved import class_of
from lorica.model import PeftModel


def make_plain(
    source: Path,
    base: str,
    revision: str | None,
    output: Path,
    *,
    rank: int | float | None,
    initial: str | os.PathLike[str] | None,
) -> None:
    """Write a saved adapter as plain LoRA. The base model is loaded, on the CPU.

    Args:
        source: directory of the adapter.
        base: the base model, with its weights.
        revision: of it.
        output: directory for the plain adapter.
        rank: of the nearest LoRA, or the share of the deltas it is to explain; see :func:`lorica.convert_to_lora`.
        initial: directory of the adapter as it was before training, where its start was taken out of the base
            weights; exact, of twice the rank.

    Raises:
        ExportError: both or neither are given, or the adapter cannot be had so.
    """
    if (rank is None) == (initial is None):
        raise ExportError(
            "either the rank of the nearest LoRA (--as-lora) or the adapter's start (--initial) is needed"
        )
    try:
        model: Any = PeftModel.from_pretrained(_load(base, revision), source)
        if rank is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Converting a PEFT adapter to LoRA that is already")
                save_as_lora(output, model, rank)
        elif initial is not None:
            start = os.fspath(initial)
            model.save_pretrained(
                str(output), path_initial_model_for_weight_conversion=start, save_embedding_layers=False
            )
    except (TypeError, ValueError) as error:
        raise ExportError(f"{source} cannot be made plain LoRA: {error}") from error


def _load(base: str, revision: str | None) -> torch.nn.Module:
    config, cls = class_of(base, revision)
    try:
        model: torch.nn.Module = cls.from_pretrained(base, revision=revision, config=config, dtype="auto")
    except (OSError, ValueError) as error:
        raise ExportError(f"{base}: its weights cannot be loaded: {error}") from error
    return model.eval()
