"""Whether a module's name is meant by a configuration. Pure functions of strings.

The rules are PEFT's, with wildcards as Megatron Bridge has them: an entry of a list that holds ``*`` is matched
against the whole name, ``*`` standing for anything. (A regular expression cannot begin with ``*`` and a module's name
cannot hold one, so neither can be meant by it.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping

from lorica.config import LoraConfig

Names = Collection[str] | str


def matches(names: Names | None, key: str) -> bool:
    """Whether ``key`` is meant by ``names``.

    Args:
        names: a string is a regular expression for the whole key (or, beginning with ``*``, a wildcard); a collection
            holds names that are equal to ``key`` or that ``key`` ends with after a dot, or wildcards.
        key: full name of a module.
    """
    if not names:
        return False
    if isinstance(names, str):
        return _compiled(_wildcard(names) if names.startswith("*") else names).fullmatch(key) is not None
    return key in names or any(entry_matches(name, key) for name in names)


def entry_matches(name: str, key: str) -> bool:
    """Whether one entry of a list means ``key``."""
    if "*" in name:
        return _compiled(_wildcard(name)).fullmatch(key) is not None
    return key == name or key.endswith(f".{name}")


def excluded(config: LoraConfig, key: str) -> bool:
    """Whether ``exclude_modules`` names the module, or one of ``modules_to_save`` is it or holds it."""
    return matches(config.exclude_modules, key) or any(
        re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", key) for name in config.modules_to_save or ()
    )


def selected(config: LoraConfig, names: Names | None, key: str) -> bool:
    """Whether the module ``key``, not excluded, is a target: meant by ``names`` and in one of the chosen layers."""
    if not matches(names, key):
        return False
    return isinstance(names, str) or key in (names or ()) or in_chosen_layer(config, key)


def in_chosen_layer(config: LoraConfig, key: str) -> bool:
    """Whether the layer number in ``key`` is one of ``layers_to_transform``; true where there is no such choice.

    The number is the first one in the name, so that the number of an expert inside a layer does not count.
    """
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    chosen = [layers] if isinstance(layers, int) else layers
    if not config.layers_pattern:
        expressions = [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    else:
        patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in patterns]
    found = next(filter(None, (_compiled(expression).match(key) for expression in expressions)), None)
    return found is not None and int(found["layer"]) in chosen


def pattern_value(patterns: Mapping[str, float] | None, key: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of ``key`` (at a dot), or ``default``."""
    for pattern, value in (patterns or {}).items():
        if _compiled(rf"(.*\.)?({pattern})$").match(key):
            return value
    return default


def shortest_names(chosen: Collection[str], others: Collection[str]) -> set[str]:
    """Return a small set of name endings that means every one of ``chosen`` and none of ``others``."""
    taken: set[str] = set()
    for key in sorted(chosen):
        if any(entry_matches(name, key) for name in taken):
            continue
        parts = key.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        taken.add(next(e for e in endings if e == key or not any(entry_matches(e, other) for other in others)))
    return taken


@functools.lru_cache(maxsize=4096)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def _wildcard(name: str) -> str:
    return ".*".join(map(re.escape, name.split("*")))
