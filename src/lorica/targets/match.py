"""Whether a module's name is meant by a configuration. Pure functions of strings.

The rules are PEFT's, with wildcards as Megatron Bridge has them: an entry of a list that holds ``*`` is matched
against the whole name, ``*`` standing for anything. (A regular expression cannot begin with ``*`` and a module's name
cannot hold one, so neither can be meant by it.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping

from lorica.config import LoraConfig

Names = Collection[str] | str


#: Whether a name is meant.
Meaning = Callable[[str], bool]


def meaning(names: Names | None) -> Meaning:
    """Return what tells whether a full name is meant by ``names``; for many names it is made once.

    Args:
        names: a string is a regular expression for the whole name (or, beginning with ``*``, a wildcard); a collection
            holds names that are equal to it or that it ends with after a dot, or wildcards.
    """
    if not names:
        return lambda key: False
    if isinstance(names, str):
        whole = _compiled(_wildcard(names) if names.startswith("*") else names)
        return lambda key: whole.fullmatch(key) is not None
    equal, endings = frozenset(names), tuple(f".{name}" for name in names if "*" not in name)
    wild = [_compiled(_wildcard(name)) for name in names if "*" in name]
    return lambda key: key in equal or key.endswith(endings) or any(one.fullmatch(key) for one in wild)


def matches(names: Names | None, key: str) -> bool:
    """Whether ``key`` is meant by ``names``; see :func:`meaning`."""
    return meaning(names)(key)


def entry_matches(name: str, key: str) -> bool:
    """Whether one entry of a list means ``key``."""
    if "*" in name:
        return _compiled(_wildcard(name)).fullmatch(key) is not None
    return key == name or key.endswith(f".{name}")


def idle_entries(names: Collection[str], keys: Collection[str]) -> set[str]:
    """Return those entries of a list that mean none of the full names ``keys``."""
    idle = set(names)
    for key in keys:
        if not idle:
            break
        ending = key
        while ending:
            idle.discard(ending)
            ending = ending.partition(".")[2]
    return {name for name in idle if "*" not in name or not any(map(meaning([name]), keys))}


def excluded(config: LoraConfig, key: str) -> bool:
    """Whether ``exclude_modules`` names the module, or one of ``modules_to_save`` is it or holds it."""
    return excluding(config)(key)


def excluding(config: LoraConfig) -> Meaning:
    """Return what tells whether a module is :func:`excluded`."""
    if not config.exclude_modules and not config.modules_to_save:
        return lambda key: False
    named = meaning(config.exclude_modules)
    saved = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in config.modules_to_save or ()]
    return lambda key: named(key) or any(one.match(key) for one in saved)


def selected(config: LoraConfig, names: Names | None, key: str) -> bool:
    """Whether the module ``key``, not excluded, is a target: meant by ``names`` and in one of the chosen layers."""
    return selecting(config, names)(key)


def selecting(config: LoraConfig, names: Names | None) -> Meaning:
    """Return what tells whether a module is :func:`selected`."""
    meant = meaning(names)
    if isinstance(names, str) or config.layers_to_transform in (None, []):
        return meant
    whole = frozenset(names or ())
    return lambda key: meant(key) and (key in whole or in_chosen_layer(config, key))


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
    avoided = {ending for key in others for ending in _endings(key)}
    for key in sorted(chosen):
        if taken.isdisjoint(endings := _endings(key)):
            taken.add(next(ending for ending in endings if ending == key or ending not in avoided))
    return taken


def _endings(key: str) -> list[str]:
    """Return what a name ends with after each of its dots, the shortest first, and the name."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


@functools.lru_cache(maxsize=4096)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def _wildcard(name: str) -> str:
    return ".*".join(map(re.escape, name.split("*")))
