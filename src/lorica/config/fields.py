"""Whether the values of a configuration are of the types that its fields are declared with."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
from collections.abc import Callable, Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lorica.errors import ConfigError

#: Whole numbers of a configuration lie below this (what a tensor can hold).
LARGEST = 2**63


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 160
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 12

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < LARGEST else f"a number of {x.bit_length():,} bits"


_short = _Short()


def quoted(value: object) -> str:
    """Return a value as it is written in Python, shortened where it is long."""
    return _short.repr(value)


def is_int(value: object) -> bool:
    """Whether a value is a whole number that a tensor can hold; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type.

    A list may be given as a tuple, and a set as a frozenset; a whole number is a ``float`` too, NaN is none.
    """
    of = _ORIGINS.get(get_origin(hint))
    if of is not None:
        return of(value, get_args(hint))
    plain = _PLAIN.get(hint)
    return isinstance(value, hint) if plain is None else plain(value)


def check_types(values: object, cls: Any, where: str = "") -> None:
    """Refuse values of other types than a dataclass declares, and numbers beyond its fields' ``least`` and ``most``.

    Args:
        values: an instance of ``cls``.
        cls: the dataclass.
        where: what stands before the name of a field in a message; by default the name of the class.

    Raises:
        ConfigError: a value does not fit; its field is named.
    """
    for name, hint, least, most, good in _declared(cls):
        value = getattr(values, name)
        if type(value) in good:
            continue
        if not fits(value, hint):
            raise ConfigError(f"{where or cls.__name__}.{name}={quoted(value)}: expected {said(hint)}")
        if isinstance(value, int | float) and not least <= value <= most:
            raise ConfigError(f"{where or cls.__name__}.{name}={quoted(value)}: must be {_bounds(least, most)}")


def said(hint: Any) -> str:
    """Return a type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(said, args)))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (list, set):
        return f"a list of {_PLURALS.get(args[0], said(args[0]))}"
    if origin is dict:
        return f"a mapping from {' to '.join(_PLURALS.get(arg, said(arg)) for arg in args)}"
    if origin is tuple:
        return f"({', '.join(map(said, args))})"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _bounds(least: float, most: float) -> str:
    if math.isinf(most):
        return f"at least {least:,}"
    return f"at most {most:,}" if math.isinf(least) else f"from {least:,} to {most:,}"


@functools.cache
def _declared(cls: Any) -> tuple[tuple[str, Any, float, float, frozenset[type]], ...]:
    """Return each field's name, its type, the least and most that it may be, and the types that need no closer look."""
    hints = get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        good = frozenset({bool, str, type(None)} & set(filter(_is_class, alternatives)))
        least, most = item.metadata.get("least", -math.inf), item.metadata.get("most", math.inf)
        found.append((item.name, hint, least, most, good))
    return tuple(found)


def _is_class(hint: Any) -> bool:
    return isinstance(hint, type)


def _in_list(value: object, args: tuple[Any, ...]) -> bool:
    return isinstance(value, list | tuple) and _all_fit(value, args[0])


def _in_set(value: object, args: tuple[Any, ...]) -> bool:
    return isinstance(value, set | frozenset) and _all_fit(value, args[0])


def _in_dict(value: object, args: tuple[Any, ...]) -> bool:
    return isinstance(value, dict) and _all_fit(value, args[0]) and _all_fit(value.values(), args[1])


def _all_fit(values: Collection[Any], hint: Any) -> bool:
    kinds = set(map(type, values))
    if kinds <= {hint} and hint in (str, bool):
        return True
    if kinds <= {int} and hint in (int, float):  # there may be very many
        return not values or (min(values) > -LARGEST and max(values) < LARGEST)
    return all(fits(value, hint) for value in values)


def _in_tuple(value: object, args: tuple[Any, ...]) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(args) and all(map(fits, value, args))


def _in_union(value: object, args: tuple[Any, ...]) -> bool:
    return any(fits(value, arg) for arg in args)


def _in_literal(value: object, args: tuple[Any, ...]) -> bool:
    return any(type(value) is type(arg) and value == arg for arg in args)


_ORIGINS: dict[Any, Callable[[object, tuple[Any, ...]], bool]] = {
    list: _in_list,
    set: _in_set,
    dict: _in_dict,
    tuple: _in_tuple,
    Union: _in_union,
    types.UnionType: _in_union,
    Literal: _in_literal,
}
_PLAIN: dict[Any, Callable[[object], bool]] = {Any: lambda value: True, int: is_int, float: is_number}
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
    Any: "anything",
}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "finite numbers", str: "strings"}

__all__ = ["check_types", "fits", "is_int", "is_number", "quoted", "said"]
