"""What to say when the names in a configuration do not fit the model."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from lorica.config import LoraConfig
from lorica.errors import TargetError, suggest
from lorica.targets.match import Names, entry_matches, idle_entries, meaning, selecting

#: Of so many wrong names, those that are near are looked for, which takes long.
_MANY = 12


def endings(modules: Collection[str]) -> list[str]:
    """Return the names that modules may be called by: their last parts, then the full ones."""
    return list(dict.fromkeys([*(name.rpartition(".")[2] for name in modules), *modules]))


def explain_no_match(config: LoraConfig, names: Names, modules: Collection[str]) -> None:
    """Say why no module is a target.

    Args:
        config: the configuration.
        names: its targets, resolved.
        modules: full names of all modules.

    Raises:
        TargetError: always.
    """
    if any(map(selecting(config, names), modules)):
        raise TargetError(
            "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` and "
            "`modules_to_save` configuration."
        )
    shown = names if isinstance(names, str) else "{" + ", ".join(map(repr, sorted(names)[:_MANY])) + "}"
    hint = "" if isinstance(names, str) or len(names) <= _MANY else f" ({len(names):,} names)"
    for name in [names] if isinstance(names, str) else sorted(names)[:_MANY]:
        hint += suggest(name.rpartition(".")[2] or name, endings(modules))
    if isinstance(names, str) and any(entry_matches(names, key) for key in modules):
        hint = f" A string is a regular expression for the whole name; pass the list [{names!r}] to match its end."
    if config.layers_to_transform is not None and any(map(meaning(names), modules)):
        hint = f" No match is in layers_to_transform={config.layers_to_transform!r}."
    raise TargetError(
        f"Target modules {shown} not found in the base model. Please check the target modules and try again.{hint}"
    )


def warn_of_idle_entries(config: LoraConfig, names: Names, keys: Collection[str]) -> None:
    """Warn of entries of ``target_modules`` that mean none of the full names ``keys``."""
    if isinstance(names, str) or config.target_modules is None:
        return
    idle = sorted(idle_entries(names, keys))
    for name in idle[:_MANY]:
        warnings.warn(f"target_modules: {name!r} matches nothing.{suggest(name, endings(keys))}", stacklevel=4)
    if len(idle) > _MANY:
        warnings.warn(f"target_modules: {len(idle) - _MANY:,} more entries match nothing", stacklevel=4)
