"""Regular expressions out of a configuration: Python's syntax and meaning, in bounded time.

A few characters are enough for a pattern that ``re`` would match for days, and nothing could stop it. So patterns are
checked by ``re``, and all but the simplest are matched by ``regex``, which looks at the clock. All matching of one
search shares its time.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from lorica.config.fields import quoted
from lorica.errors import ConfigError

#: Characters that a pattern may have. Compiling one of this length takes a few tenths of a second at most.
MAX_LENGTH = 20_000
#: Characters that a pattern may come to where its repetitions are written out, as ``regex`` does: ``(?:a{99}){99}``.
MAX_REPEATS = 20_000
#: Sets that may reach beyond ASCII: ``re`` goes through their characters one by one.
MAX_WIDE_SETS = 8
#: What compiling all patterns of a configuration may come to, in characters of 15 µs; see ``_work``. It is counted and
#: not measured, lest a slow machine refuse what another one takes.
MOST_WORK = 49_152
#: Seconds that matching may take in one search, and for each name besides. Ordinary patterns take some microseconds.
SECONDS, PER_NAME = 0.3, 150e-6

#: How PEFT puts a pattern together with the rest of a name: ``target_modules``, ``rank_pattern``, ``layers_pattern``.
Form = Literal["name", "ending", "layers"]
FORMS: dict[Form, str] = {
    "name": "{}",
    "ending": r"(.*\.)?({})$",
    "layers": r"(?:^|.*?\.){}\.(?P<layer>\d+)\.",
}
#: What stands in a pattern: a character by its name, an escape, a set of characters, a repetition, a brace.
_PIECES = re.compile(r"\\N\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?:\d+(?:,\d*)?|,\d*)\}|\{", re.DOTALL)
_TOKENS = re.compile(rf"{_PIECES.pattern}|.", re.DOTALL)
_IN_A_SET = re.compile(r"\\.|\[", re.DOTALL)
#: A piece that stands for a single character (no reference to a group, no repetition).
_IS_CHARACTER = re.compile(r"\\[^1-9{].*|\[.*", re.DOTALL)
_WIDE = re.compile(r"[^\x00-\x7f]|\\[xuUN0-7]")


class Clock:
    """The time that is left to a search."""

    def __init__(self) -> None:
        self.left = SECONDS
        self._waited = _waited()
        #: What is worked out once in a search: by the identity of what it is worked out from, which is kept with it.
        self.kept: dict[int, tuple[object, Any]] = {}

    def next_name(self) -> None:
        """Give the search the time of one more name: it may take as long as a model is large."""
        self.left += PER_NAME

    def for_a_match(self) -> float:
        """Return how long the next match may take. What the thread has waited for a processor does not count."""
        if self.left < SECONDS / 10:
            self._give_back()
        return max(1e-3, min(self.left, SECONDS))

    def is_over(self) -> bool:
        """Whether nothing is left, what the thread has waited given back."""
        if self.left <= 0:
            self._give_back()
        return self.left <= 0

    def _give_back(self) -> None:
        before, self._waited = self._waited, _waited()
        self.left += max(0.0, self._waited - before)  # not less, where another thread goes on

    def spend(self, since: float, field: str, pattern: object) -> None:
        """Take away what has passed ``since`` (of ``time.perf_counter``).

        Raises:
            ConfigError: nothing is left; the field and the pattern are named.
        """
        self.left -= time.perf_counter() - since
        if self.is_over():
            raise too_long(field, pattern)


def _waited() -> float:
    """Return how long this thread has not worked, from some time on."""
    return time.perf_counter() - time.thread_time()


_running: ContextVar[Clock | None] = ContextVar("search", default=None)


@contextmanager
def one_search() -> Iterator[None]:
    """Let everything that is matched in the block share one search's time; an inner block shares the outer one's."""
    token = _running.set(_running.get() or Clock())
    try:
        yield
    finally:
        _running.reset(token)


def clock() -> Clock:
    """Return the clock of the search that is going on; outside of one, a new one."""
    return _running.get() or Clock()


def too_long(field: str, pattern: object) -> ConfigError:
    """Return the error that says that a pattern takes too long."""
    return ConfigError(
        f"LoraConfig.{field}={quoted(pattern)}: matching it against the names of modules takes more than {SECONDS} s; "
        "write it without repetitions inside repetitions, or name the modules in a list"
    )


def _check_length(field: str, pattern: str) -> None:
    if len(pattern) > MAX_LENGTH:
        raise ConfigError(
            f"LoraConfig.{field}={quoted(pattern)}: a pattern of {len(pattern):,} characters is too long (limit "
            f"{MAX_LENGTH:,}); name the modules in a list"
        )


def check(field: str, pattern: str, form: Form) -> None:
    """Refuse what is no pattern.

    Raises:
        ConfigError: it is no regular expression by the rules of ``re``, too long, or too large to be compiled.
    """
    if form != "layers" and is_plain(pattern):
        return
    _check_length(field, pattern)
    _check_size(field, pattern)
    try:
        alone = re.compile(pattern)  # by itself: "a)|(b" would pass inside of a group
        if form == "layers" or (form != "name" and alone.flags != re.UNICODE):  # flags may not stand inside of a group
            re.compile(FORMS[form].replace("{}", pattern))
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise ConfigError(f"LoraConfig.{field}={quoted(pattern)} is not a valid regular expression: {error}") from error


def _check_size(field: str, pattern: str) -> None:
    """Refuse what is short but becomes large when it is compiled."""
    for what, count, limit in (
        ("repetitions, which written out come to", _written_out(pattern), MAX_REPEATS),
        ("sets of characters beyond ASCII:", _wide_sets(pattern), MAX_WIDE_SETS),
    ):
        if count > limit:
            raise ConfigError(
                f"LoraConfig.{field}={quoted(pattern)}: the pattern has {what} {quoted(count)} (limit {limit:,})"
            )


def _wide_sets(pattern: str) -> int:
    return sum(found[0].startswith("[") and bool(_WIDE.search(found[0])) for found in _PIECES.finditer(pattern))


def _work(pattern: str) -> int:
    """Return how much work compiling a pattern is: as much as that of so many characters at most.

    A pattern by itself takes as long as 10 of them, what a repetition repeats a sixteenth each time, and a set that
    reaches beyond ASCII 9 ms.
    """
    return 10 + len(pattern) + _written_out(pattern) // 16 + 600 * _wide_sets(pattern)


def _written_out(pattern: str) -> int:
    """Return how many characters a pattern comes to where its repetitions with numbers are written out."""
    groups, last = [0], 0  # what the groups that are open come to, and what the last piece does
    for piece in (found[0] for found in _TOKENS.finditer(pattern)):
        if piece == "(":
            groups.append(0)
            continue
        if piece == ")" and len(groups) > 1:
            last = groups.pop()
        elif piece.startswith("{") and len(piece) > 1:
            most = max([1, *(int(number[:9]) for number in re.findall(r"\d+", piece))])
            last, groups[-1] = last * most, groups[-1] + last * (most - 1)
            continue
        else:
            last = 1
        groups[-1] += last
    return sum(groups)


def check_all(patterns: Iterable[tuple[str, str, Form]]) -> None:
    """Refuse what is no pattern, and patterns of a configuration that are too long together; see :func:`check`.

    Args:
        patterns: field, pattern and form of each.
    """
    seen, work = set[tuple[str, Form]](), 0
    for field, pattern, form in patterns:
        if (pattern, form) in seen or (form != "layers" and is_plain(pattern)):
            continue
        check(field, pattern, form)
        seen.add((pattern, form))
        work += _work(pattern)
        if work > MOST_WORK:
            raise ConfigError(
                f"LoraConfig.{field}={quoted(pattern)}: the regular expressions up to this one are as much work as "
                f"{work:,} characters (limit {MOST_WORK:,}); full names of modules are no expressions, and as many as "
                "you like"
            )


_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])+")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def is_plain(pattern: str) -> bool:
    """Whether a pattern is as good as a name: nothing in it but a name's characters, and dots."""
    return _PLAIN.fullmatch(pattern) is not None


def text_of(pattern: str) -> str:
    """Return the name that a plain pattern is, if its dots are dots."""
    text = pattern.removeprefix("^")
    return _ESCAPE.sub(r"\1", text) if "\\" in text else text


def is_loose(pattern: str) -> bool:
    """Whether a plain pattern has a dot that stands for any character."""
    return "." in (_ESCAPE.sub("", pattern) if "\\" in pattern else pattern)


def means(pattern: str, name: str) -> bool:
    """Whether a plain pattern means this name, as a whole."""
    text = text_of(pattern)
    if name == text or len(name) != len(text):
        return name == text
    return all(name.startswith(piece, place) for place, piece in _pieces(pattern))


@functools.lru_cache(maxsize=4096)
def _pieces(pattern: str) -> tuple[tuple[int, str], ...]:
    """Return what stands between a plain pattern's dots that mean any character, and where."""
    letters = re.findall(r"\\?.", pattern.removeprefix("^"))
    edges = [-1, *(place for place, letter in enumerate(letters) if letter == "."), len(letters)]
    text = "".join(letter[-1] for letter in letters)
    return tuple((start + 1, text[start + 1 : stop]) for start, stop in itertools.pairwise(edges))


def matcher(field: str, pattern: str, form: Form) -> Callable[[str, Clock], Any]:
    """Return what matches a checked pattern with a name, in the time of a search; it returns the match, or None.

    Where that time is over, it raises ConfigError, which names the field and the pattern.
    """
    simple = form == "name" and _is_simple(pattern)
    try:
        compiled = re.compile(pattern) if simple else _compiled(FORMS[form].replace("{}", pattern))
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"LoraConfig.{field}={quoted(pattern)} is too large to be matched: {error}") from None
    how: Callable[..., Any] = compiled.fullmatch if form == "name" else compiled.match
    now = time.perf_counter

    def match(name: str, clock: Clock) -> Any:
        begin = now()
        try:
            found = how(name) if simple else how(name, concurrent=False, timeout=clock.for_a_match())
        except (TimeoutError, MemoryError):
            raise too_long(field, pattern) from None
        clock.left -= now() - begin
        if clock.left <= 0 and clock.is_over():
            raise too_long(field, pattern)
        return found

    return match


def _is_simple(pattern: str) -> bool:
    """Whether ``re`` takes no more than some thousand steps for each pair of characters of a name.

    So it does where only single characters are repeated, no more than two of them without bound, and little is left to
    choose. Most patterns that people write are like that; looking at the clock takes longer than matching them.
    """
    text = _PIECES.sub(lambda found: "x" if _IS_CHARACTER.fullmatch(found[0]) else "{", pattern)
    if "{" in text or re.search(r"\)[*+?]|\(\?[^:]", text):
        return False
    limits = (("(", 2), ("|", 16), ("?", 4))
    return all(text.count(sign) <= most for sign, most in limits) and text.count("*") + text.count("+") <= 2


@functools.lru_cache(maxsize=4096)
def _compiled(expression: str) -> Any:
    import regex  # takes 20 ms, and most configurations name modules without a pattern

    try:
        return regex.compile(_translated(expression), regex.VERSION0)
    except regex.error as error:
        raise ValueError(str(error)) from None


def _translated(expression: str) -> str:
    """Return what means to ``regex`` what an expression means to ``re``; their braces and brackets differ."""
    return _PIECES.sub(_piece, expression)


def _piece(found: re.Match[str]) -> str:
    piece = found[0]
    if piece == "{":
        return r"\{"
    if piece.startswith("["):
        return "[" + _IN_A_SET.sub(lambda inner: r"\[" if inner[0] == "[" else inner[0], piece[1:])
    return piece


__all__ = [
    "FORMS",
    "MAX_LENGTH",
    "SECONDS",
    "Clock",
    "Form",
    "check",
    "check_all",
    "clock",
    "is_loose",
    "is_plain",
    "matcher",
    "means",
    "one_search",
    "text_of",
]
