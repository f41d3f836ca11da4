"""Merging into weights that two modules share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from lorica.layers import LoraLayer, TrainableTokensLayer, TrainableTokensWrapper
from lorica.targets.walk import base_modules, tied_with_embedding


def _adapted_members(model: nn.Module, names: Iterable[str]) -> tuple[list[LoraLayer], int]:
    group = tied_with_embedding(model)
    if group is None:
        return [], 0
    modules = dict(base_modules(model))
    members = [_inner(modules[name]) for name in (group[0], *group[1])]
    adapted = [m for m in members if isinstance(m, LoraLayer) and any(name in m.specs for name in names)]
    return adapted, len(members)


def _inner(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, TrainableTokensWrapper) else module


def _with_rows(model: nn.Module, names: Iterable[str]) -> list[TrainableTokensLayer]:
    """Return those modules with the embedding's weight of which rows train for one of the adapters."""
    group = tied_with_embedding(model)
    modules = dict(base_modules(model)) if group is not None else {}
    found = [modules[name] for name in (group[0], *group[1])] if group is not None else []
    layers = [module.token_adapter for module in found if isinstance(module, TrainableTokensWrapper)]
    return [layer for layer in layers if any(name in layer.token_indices for name in names)]


def _have_one_source(rows: list[TrainableTokensLayer], members: int) -> bool:
    if not rows:
        return True
    return len(rows) == members and sum(layer.tied_adapter is None for layer in rows) == 1


def _is_joint(adapted: list[LoraLayer], members: int, names: Iterable[str]) -> bool:
    if not adapted:
        return True
    tied = [layer for layer in adapted if all(name in layer.tied for name in names if name in layer.specs)]
    return len(adapted) == members and len(tied) == members - 1


def untie(model: nn.Module, names: list[str]) -> None:
    """Give adapted modules that share a weight with another one a copy of their own, so that a merge changes only them.

    A warning says so. Layers whose adapter was tied (``ensure_weight_tying``) take the same delta and stay tied.
    """
    adapted, members = _adapted_members(model, names)
    rows = _with_rows(model, names)
    alone: list[LoraLayer | TrainableTokensLayer] = [] if _is_joint(adapted, members, names) else [*adapted]
    if not _have_one_source(rows, members):
        alone += [layer for layer in rows if not any(layer.target_name == other.target_name for other in alone)]
    if not alone:
        return
    shown = [layer.target_name for layer in alone]
    warnings.warn(
        f"Model with `tie_word_embeddings=True` and the tied_target_modules={shown} are part of the adapter. This "
        "can lead to complications: merging gives them a weight of their own and sets `tie_word_embeddings=False`.",
        stacklevel=4,
    )
    for layer in alone:
        layer.give_own_weight()
    _set_flag(model, False)


def retie(model: nn.Module) -> None:
    """Undo :func:`untie`, once nothing is merged any more."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer | TrainableTokensLayer)]
    untied = [layer for layer in layers if layer.untied_from is not None and not layer.merged]
    for layer in untied:
        layer.take_shared_weight()
    if untied:
        _set_flag(model, True)


def forget_tie(model: nn.Module) -> None:
    """Say in the model's configuration that its ends share no weight, where one of them was replaced for good."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in weights and weights[0] is not weights[1]:
        _set_flag(model, False)


def _set_flag(model: nn.Module, tied: bool) -> None:
    config = getattr(model, "config", None)
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = tied  # type: ignore[union-attr]
