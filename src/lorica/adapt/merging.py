"""Merging adapters into all weights of a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lorica.adapt.found import AdapterModule, adapted, tokens_among
from lorica.adapt.replicate import own_weights, share_again
from lorica.adapt.tying import retie, untie
from lorica.engines import fsdp
from lorica.layers import LoraLayer, TrainableTokensLayer
from lorica.layers.rewrites import carry_out
from lorica.storage import Room


class Adapted(NamedTuple):
    """What of a model an adapter changes, found in one walk.

    Attributes:
        modules: all adapted modules.
        layers: those with factors.
        rows: the layers of which rows train; those with rows of their own first.
    """

    modules: list[AdapterModule]
    layers: list[LoraLayer]
    rows: list[TrainableTokensLayer]

    @classmethod
    def of(cls, model: nn.Module) -> Adapted:
        """Return what is adapted in a model, where each weight is as it is at rest."""
        fsdp.reshard(model)
        modules = adapted(model)
        return cls(modules, [module for module in modules if isinstance(module, LoraLayer)], tokens_among(modules))


@torch.no_grad()
def merge(
    model: nn.Module, names: Sequence[str], *, finite: bool, keep: bool, progressbar: bool = False
) -> list[LoraLayer]:
    """Merge adapters into all weights of a model; return the layers whose quantised weight was quantised anew.

    Everything is checked before a weight is touched.

    Args:
        model: the base model, adapted.
        names: of adapters that it has. Where one is merged already it is passed over.
        finite: look for NaN and infinity in each result beforehand.
        keep: keep quantised weights as they are, to be given back by :func:`unmerge`.
        progressbar: show one.

    Raises:
        AdapterError: a result would not be finite (``finite``), or a weight cannot take a delta. Nothing was changed.
        TargetError: a delta has no place in its weight. Nothing was changed.
    """
    found, room = Adapted.of(model), Room()
    terms = [
        layer.check_merge(layer.mergeable(names), finite=finite, room=room)
        for layer in tqdm(found.layers, disable=not (progressbar and finite), desc="Checking")
    ]
    for tokens in found.rows:
        tokens.check_merge(names, finite=finite)
    own_weights(model, names, found.layers)
    untie(model, names, found.modules)
    for tokens in found.rows:
        tokens.merge(adapter_names=names)
    rewrites = [
        layer.ready_to_merge(added, keep=keep) for layer, added in zip(found.layers, terms, strict=True) if added
    ]
    carry_out(tqdm(rewrites, disable=not progressbar, desc="Merging"))
    return [layer for layer in found.layers if layer.merge_error is not None]


@torch.no_grad()
def unmerge(model: nn.Module) -> torch.dtype | None:
    """Take all merged deltas out again; return the dtype of a weight that could not keep its values exactly, if any."""
    found = Adapted.of(model)
    rewrites = [layer.ready_to_unmerge() for layer in found.layers if layer.merged_adapters]
    carry_out(rewrites)
    for tokens in found.rows[::-1]:
        tokens.unmerge()
    retie(model, found.modules)
    share_again(found.layers)
    return next((rewrite.inexact for rewrite in rewrites if rewrite.inexact is not None), None)


__all__ = ["merge", "unmerge"]
