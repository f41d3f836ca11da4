"""Merging into weights that two modules share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from lorica.adapt.found import AdapterModule
from lorica.adapt.found import adapted as adapted_modules
from lorica.layers import LoraLayer, TrainableTokensLayer, TrainableTokensWrapper
from lorica.targets.walk import bare, base_modules, tied_with_embedding


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


def untie(model: nn.Module, names: Sequence[str], modules: Iterable[AdapterModule] | None = None) -> None:
    """Give adapted modules that share a weight with another one a copy of their own, so that a merge changes only them.

    A warning says so. Layers whose adapter was tied (``ensure_weight_tying``) take the same delta and stay tied.

    Args:
        model: the base model.
        names: the adapters that are about to be merged.
        modules: the adapted modules of the model, where they are known.
    """
    if not _reach_embedding(model, adapted_modules(model) if modules is None else modules):
        return
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
        stacklevel=5,
    )
    for layer in alone:
        layer.give_own_weight()
    _set_flag(model, False)


def _reach_embedding(model: nn.Module, modules: Iterable[AdapterModule]) -> bool:
    """Whether one of the modules has the input embedding's weight; no other can have to be untied."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False
    weight = bare(embedding)._parameters.get("weight") if isinstance(embedding, nn.Module) else None
    return weight is not None and any(bare(module)._parameters.get("weight") is weight for module in modules)


def retie(model: nn.Module, modules: Iterable[AdapterModule]) -> None:
    """Undo :func:`untie` for those of the adapted modules of which nothing is merged any more."""
    layers = [m.token_adapter if isinstance(m, TrainableTokensWrapper) else m for m in modules]
    layers = [layer for layer in layers if isinstance(layer, LoraLayer | TrainableTokensLayer)]
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
