"""Reading JSON that comes from strangers: bounded in size, depth and number of values, objects only.

What JSON can say and a configuration cannot mean is refused with its place in the file: a key that stands twice,
numbers that are not finite or have more digits than a computer's, text with NUL in it or with halves of characters.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorica.errors import CheckpointError, shown
from lorica.files.opening import open_regular, read_fully

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 64
#: A value takes some hundred bytes of memory, and at least a few of text. So many bytes of the limit count as one.
_BYTES_PER_VALUE = 16
_MAX_DIGITS = 20


def read_json_object(path: str | Path, *, limit: int | None = None) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        CheckpointError: the file is larger than ``limit`` (8 MiB), is no regular file, is not JSON, is nested too
            deeply, repeats a key, has too many values, or numbers and text that nothing can mean, or holds something
            else than an object. The message says where.
    """
    path = Path(path)
    text = _text(path, MAX_BYTES if limit is None else limit)
    numbers = _Numbers()
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=numbers.refuse,
            parse_float=numbers.decimal,
            parse_int=numbers.whole,
        )
        if not isinstance(value, dict):
            raise CheckpointError(f"expected a JSON object, found {type(value).__name__}")
        _refuse_depth(value, text)
        numbers.complain(value)
        if "\\u" in text:  # nothing else makes such characters
            _refuse_characters(value)
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply to be a configuration") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    return value


def first_twice(names: Iterable[str]) -> str:
    """Return the first of the names that stand there more than once."""
    return next(name for name, count in Counter(names).items() if count > 1)


def _text(path: Path, limit: int) -> str:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size:,} bytes is too large for a configuration (limit {limit:,})")
        data = read_fully(file, size + 1)
    if len(data) != size:
        raise CheckpointError(f"{path}: was changed while it was read")
    most = limit // _BYTES_PER_VALUE
    if sum(map(data.count, (b",", b"[", b"{"))) > most:
        raise CheckpointError(f"{path}: more values than a configuration has (limit {most:,})")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError(f"the key {shown(first_twice(name for name, _ in pairs))!r} stands twice")
    return result


class _Impossible:
    """Stands for a number that is refused, until its place in the file is known."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Numbers:
    """Reads numbers, and remembers those that are refused."""

    def __init__(self) -> None:
        self._refused: list[_Impossible] = []

    def decimal(self, text: str) -> float | _Impossible:
        """Return a number with a point or an exponent."""
        number = float(text)
        return number if math.isfinite(number) else self.refuse(text)

    def whole(self, text: str) -> int | _Impossible:
        """Return a number without."""
        return int(text) if len(text) <= _MAX_DIGITS else self.refuse(text)

    def refuse(self, text: str) -> _Impossible:
        """Return what stands in the number's place."""
        self._refused.append(_Impossible(text))
        return self._refused[-1]

    def complain(self, value: Any) -> None:
        """Name the place of the first that was refused, if any was."""
        if self._refused:
            place = next(place for place, found in _leaves(value) if found is self._refused[0])
            text = shown(self._refused[0].text, 40)
            raise CheckpointError(f"{place}: {text} is no finite number of at most {_MAX_DIGITS} digits")


def _refuse_depth(value: Any, text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = itertools.chain.from_iterable(one.values() if type(one) is dict else one for one in level)
        level = [one for one in inside if type(one) is dict or type(one) is list]
    if level:
        raise RecursionError


def _refuse_characters(value: Any) -> None:
    for place, found in _leaves(value):
        for text in (place, found):
            if isinstance(text, str) and ("\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)):
                raise CheckpointError(f"{shown(place)}: holds NUL, or half of a character")


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what has nothing inside, and where it is: ``alpha_pattern.q_proj``, ``target_modules[3]``."""
    waiting = [("", value)]
    while waiting:
        place, one = waiting.pop()
        if isinstance(one, dict) and one:
            waiting += [(f"{place}.{key}" if place else key, inner) for key, inner in reversed(one.items())]
        elif isinstance(one, list) and one:
            waiting += [(f"{place}[{index}]", inner) for index, inner in reversed([*enumerate(one)])]
        else:
            yield place, one


__all__ = ["MAX_BYTES", "MAX_DEPTH", "first_twice", "read_json_object"]
