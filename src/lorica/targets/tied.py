"""Modules that share one weight (``ensure_weight_tying``)."""

from __future__ import annotations

import warnings

from torch import nn

from lorica.config import LoraConfig
from lorica.targets.match import Names, excluded, matches
from lorica.targets.saved import saved_modules

_TIED_WARNING = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not "
    "set to True. The adapted layer then differs from the one it shares its weight with, and merging has to untie them."
)


def tying(
    group: tuple[str, list[str]] | None,
    modules: dict[str, nn.Module],
    config: LoraConfig,
    names: Names,
    *,
    staged: bool,
) -> tuple[dict[str, str | None], Names, dict[str, str]]:
    """Return the modules to save, the target names and the tied targets, with ``ensure_weight_tying`` carried out."""
    saved: dict[str, str | None] = dict.fromkeys(saved_modules(config, modules, staged=staged))
    if group is None:
        if config.ensure_weight_tying:
            warnings.warn(
                "You have requested `ensure_weight_tying`, but no tied modules were found in the model", stacklevel=4
            )
        return saved, names, {}
    source, others = group
    members = {source, *others}
    in_saved = members & saved.keys()
    in_targets = {key for key in members if matches(names, key) and not excluded(config, key)}
    if not config.ensure_weight_tying:
        if in_saved or in_targets:
            warnings.warn(_TIED_WARNING, stacklevel=4)
        return saved, names, {}
    if in_saved:
        return {**saved, source: None, **dict.fromkeys(others, source)}, names, {}
    if in_targets:
        return saved, _with_name(names, source), dict.fromkeys(others, source)
    if config.trainable_token_indices is None:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`",
            stacklevel=4,
        )
    return saved, names, {}


def _with_name(names: Names, name: str) -> Names:
    if matches(names, name):
        return names
    return f"(?:{names}|{name.replace('.', '[.]')})" if isinstance(names, str) else {*names, name}


__all__ = ["tying"]
