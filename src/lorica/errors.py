"""The errors lorica raises. Each says what is wrong, where, and what to do."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType


class LoricaError(Exception):
    """Base class of every error that lorica raises on purpose."""


class ConfigError(LoricaError, ValueError):
    """A configuration value is of the wrong type, out of range, or contradicts another."""


class TargetError(LoricaError, ValueError):
    """A target, pattern or module name does not fit the model."""


class AdapterError(LoricaError, ValueError):
    """An adapter name is unknown, taken, or in a state that forbids what was asked."""


class SwapError(LoricaError, RuntimeError):
    """An adapter cannot take the place of another one."""


class CheckpointError(LoricaError, ValueError):
    """A file or directory cannot be read as what it claims to be."""


class UnfittingError(CheckpointError):
    """Tensors are missing from a file, or there are some that nobody has a place for."""


class RecipeError(LoricaError, ValueError):
    """A training recipe holds a wrong key, path, type or column."""


class ExportError(LoricaError, ValueError):
    """What is to be read by another program holds something that it would lose or misread."""


class LayoutError(LoricaError, ValueError):
    """A weight cannot lie over ranks in the way that is described."""


class RankError(LoricaError, RuntimeError):
    """Ranks disagree, or one of them did not answer in time."""


class LostRankError(RankError):
    """Another rank died, or did not answer in time."""


class MissingExtraError(LoricaError, ImportError):
    """An optional dependency is needed that is not installed."""


@contextlib.contextmanager
def naming(file: str | os.PathLike[str], *kinds: type[LoricaError]) -> Iterator[None]:
    """Begin errors of these kinds with the file that they are about, unless they name its directory already."""
    try:
        yield
    except kinds as error:
        if os.path.dirname(file) in str(error):
            raise
        raise type(error)(f"{os.fspath(file)}: {error}") from error


def require_extra(module: str, extra: str) -> ModuleType:
    """Import ``module`` or say which extra of lorica installs it.

    Raises:
        MissingExtraError: ``module`` cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtraError(
            f"This needs the package {name!r}, which is not installed. Install it with: pip install 'lorica[{extra}]'"
        ) from error


#: Looking for what is near takes a time that grows with the square of the words' lengths: a tenth of a second for so
#: many pairs of characters.
_NEAR_LENGTH, _NEAR_WORDS, _NEAR_PAIRS = 200, 5_000, 4_000_000


def shown(value: object, most: int = 160) -> str:
    """Return a stranger's word for a message: short, and without characters that would do something to a terminal."""
    if isinstance(value, int) and value.bit_length() > 512:
        return "a number of many digits"
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= most else f"{text[:most]}…"
    return text if text.isprintable() else ascii(text)[1:-1]


def suggest(wrong: str, known: Iterable[str], *, limit: int = 5) -> str:
    """Return ``" Did you mean …?"`` with the nearest of ``known``, or an empty string; long words are near to none."""
    if len(wrong) > _NEAR_LENGTH:
        return ""
    most = min(_NEAR_WORDS, _NEAR_PAIRS // max(1, len(wrong)) ** 2)
    words = [word for word in dict.fromkeys(itertools.islice(known, most)) if len(word) <= _NEAR_LENGTH]
    near = difflib.get_close_matches(wrong, words, n=limit, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""


def suggest_path(path: str | os.PathLike[str]) -> str:
    """Return ``" Did you mean …?"`` with entries near ``path`` on the disk, or an empty string."""
    parent = Path(path).expanduser().parent
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        return f" There is no directory {parent}." if str(parent) not in ("", ".") else ""
    near = difflib.get_close_matches(Path(path).name, names, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(repr(str(parent / name)) for name in near)}?" if near else ""
