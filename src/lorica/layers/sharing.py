"""Layers that get the same input tensor (q, k, v; gate, up) are computed together, by whichever is called first.

Which these are is not known from names. Neighbours under one parent with equally wide inputs are taken to share one
until a forward shows otherwise: the first that is called computes all; another that is then called with the very same
tensor finds its output ready; one that is called with a different tensor, or never, leaves, with those that were not
called yet. A guess that was wrong costs a product once and changes no digit: outputs that nobody took have no gradient.

Every module is still called, with its hooks, and no model is patched. Nothing is shared while tensors that autograd
saves go through hooks: a checkpoint that runs part of a block again would find other tensors to save than before.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.kernels import Dropped, draw_seed
from lorica.ops.linear import Linear

_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Drawn(NamedTuple):
    """The last mask of dropout.

    Attributes:
        x: the input that it is for.
        version: of ``x``.
        dropped: its seed and probability.
        users: the layers (by their identities) that had it; none has it twice.
    """

    x: weakref.ref[Tensor]
    version: int
    dropped: Dropped
    users: set[int]


class Masks:
    """The masks of dropout of neighbours, whether they share their inputs or not."""

    def __init__(self) -> None:
        self._drawn: dict[int, _Drawn] = {}  # by thread

    def __deepcopy__(self, memo: Any) -> Masks:
        """Return an empty one; it holds nothing between forwards."""
        return Masks()

    def __reduce__(self) -> Any:
        return (Masks, ())

    def dropped(self, p: float, x: Tensor, layer: nn.Module) -> Dropped:
        """Return a layer's mask for an input: one draw for all that get it, whether they are computed together or not,
        so that a checkpoint that runs them again in another way draws the same masks."""
        thread = threading.get_ident()
        last = self._drawn.get(thread)
        if (
            last is None
            or last.x() is not x
            or last.version != x._version
            or last.dropped.p != p
            or id(layer) in last.users
        ):
            last = self._drawn[thread] = _Drawn(weakref.ref(x), x._version, Dropped(p, draw_seed()), set())
        last.users.add(id(layer))
        return last.dropped


class _Ready(NamedTuple):
    """Outputs that were computed for layers that have not been called yet.

    Attributes:
        x: the input they were computed from, as the layers get it.
        version: of ``x``, which a write in place would change.
        outputs: layer (by its identity) → its output.
    """

    x: Tensor
    version: int
    outputs: dict[int, Tensor]


class Family:
    """Layers that are taken to share their input.

    Attributes:
        members: in the order of the model.
    """

    def __init__(self, members: Iterable[nn.Module] = ()) -> None:
        self.members = [weakref.ref(member) for member in members]
        self._ready: dict[int, _Ready] = {}  # by thread

    def __deepcopy__(self, memo: Any) -> Family:
        """Return an empty one, which the copied layers join as they are called."""
        return Family()

    def __reduce__(self) -> Any:
        return (Family, ())

    def taken(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Return the output that is ready for a layer; None: it has to be computed.

        Those for whom ``x`` shows that they have an input of their own leave.
        """
        thread = threading.get_ident()
        ready = self._ready.get(thread)
        if ready is None:
            return None
        mine = ready.outputs.pop(id(layer), None)
        if mine is not None and ready.x is x and ready.version == x._version:
            if not ready.outputs:
                del self._ready[thread]
            return mine
        del self._ready[thread]
        leaving = set(ready.outputs) | (set() if mine is None else {id(layer)})
        self._leave(leaving)
        return None

    def keep(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        """Have outputs ready for the layers that share ``x``."""
        if outputs:
            self._ready[threading.get_ident()] = _Ready(x, x._version, outputs)

    def others(self, layer: nn.Module) -> list[nn.Module]:
        """Return the other members that are there still; a copied layer, which is no member yet, joins and is alone."""
        found = [member for ref in self.members if (member := ref()) is not None]
        if not any(member is layer for member in found):
            self.members.append(weakref.ref(layer))
            return []
        return [member for member in found if member is not layer and member.__dict__.get("family") is self]

    def _leave(self, leaving: set[int]) -> None:
        found = [member for ref in self.members if (member := ref()) is not None]
        gone = [member for member in found if id(member) in leaving]
        self.members = [weakref.ref(member) for member in found if id(member) not in leaving]
        _found(gone)
        if len(self.members) == 1:
            _found([member for ref in self.members if (member := ref()) is not None])


def _found(members: list[nn.Module]) -> None:
    family = Family(members) if len(members) > 1 else None
    for member in members:
        member.__dict__["family"] = family


def introduce(layers: Iterable[Any]) -> None:
    """Make families of the linear layers that have one parent and equally wide inputs.

    Items of a list of modules follow one another and are left out.

    Args:
        layers: adapted layers of one model.
    """
    families: dict[tuple[str, int], list[Any]] = {}
    for layer in layers:
        parent, _, name = layer.target_name.rpartition(".")
        if type(layer.op) is Linear and layer.site is None and not name.isdigit():
            features = getattr(layer._modules["base_layer"], "in_features", None)
            if features is not None:
                families.setdefault((parent, features), []).append(layer)
    for members in families.values():
        known = {id(member): member for layer in members for member in _known(layer)}
        _found(list(known.values()))
        masks = Masks()
        for member in known.values():
            member.__dict__["masks"] = masks


def _known(layer: Any) -> list[Any]:
    family = layer.__dict__.get("family")
    return [layer] if family is None else [layer, *family.others(layer)]


def may_share() -> bool:
    """Tell whether outputs may be computed ahead now."""
    return torch.is_grad_enabled() and _hooks(True) is None
