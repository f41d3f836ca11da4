"""Layers of an engine's own: of which kind a class is, looked up once, and how a layer lies, worked out once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from lorica.engines.registry import qualified_names
from lorica.engines.site import Axis
from lorica.layout import Layout

#: Where a layer keeps how it was described.
_DESCRIBED = "lorica_described"


class Kinds:
    """Which of some classes, known by their full names, a class is or is derived from.

    Args:
        names: in the order in which they are looked for.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._found: dict[type, str | None] = {}

    def of(self, cls: type) -> str | None:
        """Return the first name that the class or one of its bases has; None: it is of none of these kinds."""
        if cls not in self._found:
            names = qualified_names(cls)
            self._found[cls] = next((name for name in self._names if name in names), None)
        return self._found[cls]


@dataclass
class Placed:
    """How one layer lies; an engine's own class adds where it is adapted.

    Attributes:
        module: the layer.
        kind: the full name of the engine's class that it is, or is derived from.
        layout: how its logical weight lies.
        axes: the axes that concern it.
    """

    module: Any = field(repr=False)
    kind: str
    layout: Layout
    axes: dict[str, Axis]

    @property
    def at(self) -> dict[str, int]:
        """This rank's coordinates."""
        return {name: axis.rank for name, axis in self.axes.items()}


_P = TypeVar("_P", bound=Placed)


def described_once(module: nn.Module, describe: Callable[[Any], _P]) -> _P:
    """Return how a layer lies; worked out anew only for a copy of a layer, and after :func:`describe_anew`."""
    found: _P | None = module.__dict__.get(_DESCRIBED)
    if found is None or found.module is not module:
        found = module.__dict__[_DESCRIBED] = describe(module)
    return found


def describe_anew(module: nn.Module) -> None:
    """Let a layer be described anew: it was told something."""
    module.__dict__.pop(_DESCRIBED, None)


def describe_whole(module: nn.Module, found: Placed) -> None:
    """Let a layer be described as ``found``, but whole."""
    layout = Layout(dict(found.layout.sizes), (), found.layout.parts)
    module.__dict__[_DESCRIBED] = replace(found, module=module, layout=layout)


__all__ = ["Kinds", "Placed", "describe_anew", "describe_whole", "described_once"]
