"""Whether a module's name is meant by a configuration. Pure functions of strings.

The rules are PEFT's, with wildcards as Megatron Bridge has them: an entry of a list that holds ``*`` is matched
against the whole name, ``*`` standing for anything. (A regular expression cannot begin with ``*`` and a module's name
cannot hold one, so neither can be meant by it.)
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from lorica.config import LoraConfig, expressions
from lorica.config.expressions import Clock

Names = Collection[str] | str


#: Whether a name is meant.
Meaning = Callable[[str], bool]

#: The layer's number, where no ``layers_pattern`` says what the list of layers is called.
_LAYER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")
#: Up to so many endings are compared one after the other; more are looked up.
_FEW = 32


def meaning(names: Names | None, field: str = "target_modules") -> Meaning:
    """Return what tells whether a full name is meant by ``names``; for many names it is made once.

    Args:
        names: a string is a regular expression for the whole name (or, beginning with ``*``, a wildcard); a collection
            holds names that are equal to it or that it ends with after a dot, or wildcards.
        field: the field of the configuration that holds them, for messages.

    Matching a regular expression or wildcards raises ``ConfigError`` where it takes too long.
    """
    if not names:
        return lambda key: False
    clock = expressions.clock()
    if isinstance(names, str):
        return _wild([names], field, clock) if names.startswith("*") else _expression(names, field, clock)
    equal, wild = frozenset(names), [name for name in names if "*" in name]
    if len(equal) > _FEW:
        named: Meaning = lambda key: not equal.isdisjoint(_endings(key))  # noqa: E731
    else:
        endings = tuple(f".{name}" for name in names if "*" not in name)
        named = lambda key: key in equal or key.endswith(endings)  # noqa: E731
    if not wild:
        return named
    some = _wild(wild, field, clock)
    return lambda key: named(key) or some(key)


def _expression(pattern: str, field: str, clock: Clock) -> Meaning:
    if expressions.is_plain(pattern):
        return lambda key: expressions.means(pattern, key)
    match = expressions.matcher(field, pattern, "name")

    def means(key: str) -> bool:
        clock.next_name()
        return match(key, clock) is not None

    return means


def _wild(names: Collection[str], field: str, clock: Clock) -> Meaning:
    """Return what tells whether one of these wildcards means a whole name."""
    split = [name.split("*") for name in names]

    def means(key: str) -> bool:
        clock.next_name()
        begin = time.perf_counter()
        found = any(_fits_wildcard(parts, key) for parts in split)
        clock.spend(begin, field, names)
        return found

    return means


def _fits_wildcard(parts: list[str], key: str) -> bool:
    """Whether a name is these parts, with anything between them."""
    first, *middle, last = parts
    end = len(key) - len(last)
    if not (key.startswith(first) and key.endswith(last)) or end < len(first):
        return False
    place = len(first)
    for part in middle:
        place = key.find(part, place, end)
        if place < 0:
            return False
        place += len(part)
    return True


def matches(names: Names | None, key: str) -> bool:
    """Whether ``key`` is meant by ``names``; see :func:`meaning`."""
    return meaning(names)(key)


def entry_matches(name: str, key: str) -> bool:
    """Whether one entry of a list means ``key``."""
    if "*" in name:
        return _fits_wildcard(name.split("*"), key)
    return key == name or key.endswith(f".{name}")


def idle_entries(names: Collection[str], keys: Collection[str]) -> set[str]:
    """Return those entries of a list that mean none of the full names ``keys``."""
    idle = set(names)
    for key in keys:
        if not idle:
            break
        idle.difference_update(_endings(key))
    clock = expressions.clock()
    for name in [name for name in idle if "*" in name]:
        begin, parts = time.perf_counter(), name.split("*")
        if any(_fits_wildcard(parts, key) for key in keys):
            idle.remove(name)
        clock.spend(begin, "target_modules", name)
    return idle


def excluded(config: LoraConfig, key: str) -> bool:
    """Whether ``exclude_modules`` names the module, or one of ``modules_to_save`` is it or holds it."""
    return excluding(config)(key)


def excluding(config: LoraConfig) -> Meaning:
    """Return what tells whether a module is :func:`excluded`."""
    if not config.exclude_modules and not config.modules_to_save:
        return lambda key: False
    named = meaning(config.exclude_modules, "exclude_modules")
    saved = [f".{name}." for name in config.modules_to_save or ()]
    return lambda key: named(key) or any(one in f".{key}." for one in saved)


def selected(config: LoraConfig, names: Names | None, key: str) -> bool:
    """Whether the module ``key``, not excluded, is a target: meant by ``names`` and in one of the chosen layers."""
    return selecting(config, names)(key)


def selecting(config: LoraConfig, names: Names | None) -> Meaning:
    """Return what tells whether a module is :func:`selected`."""
    meant = meaning(names)
    if isinstance(names, str) or config.layers_to_transform in (None, []):
        return meant
    whole, chosen = frozenset(names or ()), in_chosen_layers(config)
    return lambda key: meant(key) and (key in whole or chosen(key))


def in_chosen_layers(config: LoraConfig) -> Meaning:
    """Return what tells whether the layer number in a name is one of ``layers_to_transform``.

    The number is the first one in the name, so that the number of an expert inside a layer does not count.
    """
    layers, patterns = config.layers_to_transform, config.layers_pattern
    chosen = frozenset([layers] if isinstance(layers, int) else layers or ())
    if not patterns:
        return lambda key: (found := _LAYER.match(key)) is not None and int(found["layer"]) in chosen
    clock = expressions.clock()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matchers = [expressions.matcher("layers_pattern", one, "layers") for one in patterns]

    def means(key: str) -> bool:
        clock.next_name()
        found = next(filter(None, (match(key, clock) for match in matchers)), None)
        return found is not None and int(found["layer"]) in chosen

    return means


class Values:
    """What ``rank_pattern`` or ``alpha_pattern`` gives: the value of the first pattern that matches the end of a name.

    Patterns that are as good as names are looked up, however many there are.

    Args:
        patterns: pattern → value.
        field: the field of the configuration, for messages.
    """

    def __init__(self, patterns: Mapping[str, float] | None, field: str) -> None:
        self._field = field
        self._values = list((patterns or {}).items())
        #: The text of a plain pattern → its place in the list, and whether it means the whole of a name alone.
        self._named: dict[str, list[tuple[int, bool]]] = defaultdict(list)
        #: Length → number of dots → plain patterns of which a dot could stand for another character.
        self._loose: dict[int, dict[int, list[tuple[int, bool, str]]]] = defaultdict(lambda: defaultdict(list))
        self._expressions: list[tuple[int, Callable[[str, Clock], Any]]] = []
        for place, (pattern, _) in enumerate(self._values):
            if not expressions.is_plain(pattern):
                self._expressions.append((place, expressions.matcher(field, pattern, "ending")))
                continue
            text, whole = expressions.text_of(pattern), pattern.startswith("^")
            self._named[text].append((place, whole))
            if expressions.is_loose(pattern):
                self._loose[len(text)][text.count(".")].append((place, whole, pattern))

    def of(self, key: str, default: float, clock: Clock) -> float:
        """Return the value of a name, or ``default``; ``clock`` is the search's.

        Raises:
            ConfigError: matching takes too long.
        """
        if not self._values:
            return default
        clock.next_name()
        begin = time.perf_counter()
        first = min(self._places(key), default=len(self._values))
        clock.spend(begin, self._field, "its patterns")
        for place, match in self._expressions:
            if place > first:
                break
            if match(key, clock):
                first = place
                break
        return self._values[first][1] if first < len(self._values) else default

    def _places(self, key: str) -> Iterator[int]:
        """Yield the places of the plain patterns that mean a name."""
        for ending in _endings(key):
            yield from (place for place, whole in self._named.get(ending, ()) if ending == key or not whole)
            # A character that is no dot is matched by itself alone. So another name of this length has more dots.
            for dots, found in self._loose.get(len(ending), {}).items():
                if dots > ending.count("."):
                    fitting = ((place, one) for place, whole, one in found if ending == key or not whole)
                    yield from (place for place, one in fitting if expressions.means(one, ending))


def pattern_value(
    patterns: Mapping[str, float] | None, key: str, default: float, field: str = "alpha_pattern"
) -> float:
    """Return the value of the first pattern that matches the end of ``key`` (at a dot), or ``default``.

    In one search (:func:`lorica.config.expressions.one_search`) the patterns must not be changed in place.
    """
    if not patterns:
        return default
    clock = expressions.clock()
    if id(patterns) not in clock.kept:
        clock.kept[id(patterns)] = patterns, Values(patterns, field)
    values: Values = clock.kept[id(patterns)][1]
    return values.of(key, default, clock)


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
