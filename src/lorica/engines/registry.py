"""What an engine answers of the layers that it cuts, and the registry of those that have layers of their own.

An engine whose cuts stand on the weights (``DTensor``) needs no entry: placements say all. One with layer classes of
its own recognises them and gives a :class:`Description` of each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from lorica.engines.site import Axis, Site
from lorica.layout import Layout, Roles


class Description(Protocol):
    """How one base layer lies over ranks, as its engine says it; the native layers say it themselves.

    Attributes:
        layout: how the logical weight lies over the axes.
        axes: every axis that the layout names, and those that the engine knows besides.
        at: this rank's coordinates.
        splits_tokens: whether what leaves the layer, or enters it, is this rank's tokens only.
    """

    layout: Layout
    axes: dict[str, Axis]

    @property
    def at(self) -> dict[str, int]: ...

    @property
    def splits_tokens(self) -> bool: ...

    def place(self, axes: Mapping[str, Axis], data: tuple[str, ...]) -> Site:
        """Return where the layer is adapted.

        Args:
            axes: those of the model.
            data: the names of those over which batches are divided.
        """


#: Offsets that enclosing modules put before the dimensions of a tensor: (axis, place, pieces).
Offsets = Sequence[tuple[int, int, int]]
#: End of the name of a logical tensor, and which part of the tensor of all projections it is; None: all.
Windows = Sequence[tuple[str, tuple[slice, ...] | None]]


class Checkpoints(Protocol):
    """How the library of an engine writes distributed checkpoints, of which it asks each module of a model its part."""

    def state_of(self, module: nn.Module, prefix: str, sharded_offsets: Offsets, metadata: Any) -> dict[str, Any]:
        """Return the part of a module that is not adapted.

        Args:
            module: it.
            prefix: of the names.
            sharded_offsets: those of the modules around it.
            metadata: what the library handed on.
        """

    def sharded(
        self, tensor: Tensor, key: str, end: str, windows: Windows, roles: Roles, site: Site | None, offsets: Offsets
    ) -> Any:
        """Return a factor as the library wants it.

        Args:
            tensor: what this rank has.
            key: its name; modules around it may change the beginning later.
            end: the end of it that differs for each of the logical tensors.
            windows: the ends of the names of the logical tensors it is made of.
            roles: of its dimensions.
            site: where it lies.
            offsets: those of the modules around it.
        """


class Engine(Protocol):
    """A library with layers of its own."""

    def knows(self, cls: type[nn.Module]) -> bool:
        """Whether a class, or one that it is derived from, is one of its layers."""

    def describe(self, module: nn.Module) -> Description | None:
        """Return how a layer of a class that it knows lies; None: it is whole."""

    def uncut(self, module: nn.Module) -> None:
        """Let a copy of such a layer, whose weight is whole, be described so."""

    def prepare(self, model: nn.Module) -> None:
        """Tell layers what they cannot know by themselves: what is fused in them, which number they have in all.

        Called before targets are looked for; nothing of what the model computes may change.
        """

    def adapted(self, model: nn.Module, finish: Callable[[nn.Module], None]) -> None:
        """Do what a model needs once it has an adapter.

        Args:
            model: the base model.
            finish: sums what gradients lack, for an engine whose training loop can call it at the right moment.
        """

    def mark(self, module: nn.Module, site: Site, parameter: nn.Parameter, roles: Roles) -> None:
        """Note on a factor of a layer what the engine's own training loop has to know of it."""

    def reduces(self, parameter: nn.Parameter) -> Collection[str]:
        """Return the axes over which the engine's own training loop reduces the gradient of a parameter."""

    def axes(self, model: nn.Module) -> Mapping[str, Axis]:
        """Return the axes that divide a model, beside those of its layers."""

    def stages(self, model: nn.Module) -> Axis | None:
        """Return the axis of a model's pipeline stages, if it has one."""

    def lies_elsewhere(self, model: nn.Module, name: str) -> bool:
        """Whether what has a logical name lies on other ranks only, without anything in its place here."""

    def checkpoints(self) -> Checkpoints | None:
        """Return how its library writes distributed checkpoints; None where it is not loaded, or has none."""


#: Engines in the order in which they are asked. Filled by :mod:`lorica.engines.describe`.
ENGINES: list[Engine] = []


def engine_of(cls: type[nn.Module]) -> Engine | None:
    """Return the engine that knows a class of base layers."""
    if cls not in _ENGINE_OF:
        _ENGINE_OF[cls] = next((engine for engine in ENGINES if engine.knows(cls)), None)
    return _ENGINE_OF[cls]


_ENGINE_OF: dict[type, Engine | None] = {}


def described(module: nn.Module) -> Description | None:
    """Return what the engine of a base layer says of it; None where it is no layer of an engine's own."""
    engine = engine_of(type(module))
    return None if engine is None else engine.describe(module)


def prepare(model: nn.Module) -> None:
    """Let every engine tell the layers of a model what they cannot know by themselves."""
    for engine in ENGINES:
        engine.prepare(model)


def in_pieces(module: nn.Module) -> None:
    """Note that a layer is adapted by others, each of which is a piece of it, and is no target itself."""
    module.__dict__[_IN_PIECES] = True


def is_in_pieces(module: nn.Module) -> bool:
    """Whether others that are pieces of a layer are targets in its place."""
    return _IN_PIECES in module.__dict__


_IN_PIECES = "lorica_in_pieces"


def mark(module: nn.Module, site: Site, parameter: nn.Parameter, roles: Roles) -> None:
    """Note on a factor of a layer what the training loop of the layer's engine has to know of it."""
    engine = engine_of(type(module))
    if engine is not None:
        engine.mark(module, site, parameter, roles)


def reduced_by_engines(parameter: nn.Parameter) -> set[str]:
    """Return the axes over which the training loop of an engine reduces the gradient of a parameter."""
    return {axis for engine in ENGINES for axis in engine.reduces(parameter)}


def lies_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether what has a logical name lies on other ranks only, without anything in its place here."""
    return any(engine.lies_elsewhere(model, name) for engine in ENGINES)


def checkpoints() -> Checkpoints | None:
    """Return how the library that is loaded writes distributed checkpoints; None where none is that has some."""
    return next((found for engine in ENGINES if (found := engine.checkpoints()) is not None), None)


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of an engine's own layer."""
    found = described(module)
    return None if found is None else found.layout


def uncut(module: nn.Module) -> None:
    """Let a copy of a layer, whose weight is whole, be described so."""
    engine = engine_of(type(module))
    if engine is not None:
        engine.uncut(module)


def lend(owner: nn.Module, borrower: nn.Module) -> None:
    """Let a layer without a weight, which is handed another layer's in every call, be adapted like one that has it."""
    borrower.__dict__[_LENDER] = owner  # not as an attribute: it is no part of the layer


def lender_of(module: nn.Module) -> nn.Module:
    """Return the layer whose weight a layer computes with: itself, as nearly always."""
    found: nn.Module = module.__dict__.get(_LENDER, module)
    return found


_LENDER = "lorica_lender"


def qualified_names(cls: type) -> list[str]:
    """Return the full names of a class and of those it is derived from: how classes are known without an import."""
    return [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__]


__all__ = [
    "ENGINES",
    "Checkpoints",
    "Description",
    "Engine",
    "Offsets",
    "Windows",
    "checkpoints",
    "described",
    "engine_of",
    "in_pieces",
    "is_in_pieces",
    "layout_of",
    "lend",
    "lender_of",
    "lies_elsewhere",
    "mark",
    "prepare",
    "qualified_names",
    "reduced_by_engines",
    "uncut",
]
