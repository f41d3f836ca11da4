"""Seeing what base layers are given and give, inside the collectives of the engine that cut them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from lorica.adapt.inject import adapter_modules, switch_of, target_at
from lorica.engines.kinds import is_distributed
from lorica.engines.site import Opening, localise, opening_of
from lorica.errors import AdapterError
from lorica.layers import LoraLayer, Switch
from lorica.targets.plan import Plan, Target

#: Called with a target, what it is given and what it gives, both this rank's; returns what it is to give.
Record = Callable[[Target, Tensor, Tensor], Tensor]


def can_be_watched(target: Target) -> bool:
    """Whether a target multiplies its input by one matrix: other layers have no inputs that say how A should start."""
    return target.op.kind == "Linear" and target.tied_to is None


def targets_of(plan: Plan) -> list[Target]:
    """Return the targets of a plan that can be watched."""
    never_called = {f"{target.name}.{child}" for target in plan.targets for child in target.op.children}
    return [target for target in plan.targets if can_be_watched(target) and target.name not in never_called]


def adapted_targets(model: nn.Module, adapter: str) -> list[tuple[str, Target]]:
    """Return the layers that have an adapter and can be watched, with their names in ``model``."""
    layers = [(name, module) for name, module in adapter_modules(model) if isinstance(module, LoraLayer)]
    never_called = {f"{layer.target_name}.{child}" for _, layer in layers for child in layer.op.children}
    found = []
    for name, layer in layers:
        if adapter in layer.specs and adapter not in layer.tied and layer.target_name not in never_called:
            target = target_at(layer, adapter)
            if can_be_watched(target):
                found.append((name, target))
    return found


class Watch:
    """A context in which every forward of the targets is reported.

    Args:
        targets: the base layers; adapters on them should be off.
        record: what is called.
        kind: targets of different kinds never share what is known of their inputs.

    Attributes:
        leader: name of a target → name of the first one that is given the same tensor in each forward. Known after the
            first forward.
    """

    def __init__(
        self, targets: Iterable[Target], record: Record, kind: Callable[[Target], Hashable] = lambda target: 0
    ) -> None:
        self.leader: dict[str, str] = {}
        self._targets = list(targets)
        self._record = record
        self._kind = kind
        self._given: dict[Hashable, tuple[weakref.ref[Tensor], Any, str]] = {}
        self._stack = ExitStack()

    def leads(self, target: Target) -> bool:
        """Whether a target is the first of those that are given the same tensor."""
        return self.leader.get(target.name, target.name) == target.name

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for target in self._targets:
                place = target.site.opening if target.site is not None else None
                opening = place.again() if place is not None else opening_of(target.base)
                opening.put(partial(self._forward, target, opening))
                stack.callback(opening.close)
                hook = partial(self._notice, target)
                # Before the engine's own hooks, which gather or cut the input for each layer anew.
                handle = target.base.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._given.clear()
        self._stack.close()

    def _forward(self, target: Target, opening: Opening, *args: Any, **kwargs: Any) -> Any:
        x, y = _input(args, kwargs), opening.original(*args, **kwargs)
        if target.site is None:
            return self._record(target, x, y)
        x, y, back = localise(target.site, x, y)
        return back(self._record(target, x, y))

    def _notice(self, target: Target, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _input(args, kwargs)
        where = (self._kind(target), id(x) if is_distributed(x) else (x.data_ptr(), x.shape, x.stride(), x.dtype))
        reference, version, first = self._given.get(where, (None, None, target.name))
        # Memory is reused: only a tensor that still lives, and that nobody wrote to, is the same one.
        if reference is None or reference() is None or version != _version(x):
            first = target.name
        known = self.leader.setdefault(target.name, first)
        if known not in (first, target.name):
            raise AdapterError(
                f"{target.name}: was given the input of {known} in the first batch, and another one now; give it a "
                "prepare_layer_inputs_fn of its own (a dictionary by names), so that the two are looked at apart"
            )
        if known == target.name:
            self._given[where] = (weakref.ref(x), _version(x), target.name)


def _input(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("input", kwargs.get("x"))


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run a block with the model's adapters turned off."""
    with (switch_of(model) or Switch()).off():
        yield


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a block in training or evaluation mode; every module gets its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, value in before:
            with contextlib.suppress(AttributeError):
                module.training = value


__all__ = ["Watch", "adapted_targets", "adapters_off", "can_be_watched", "mode", "targets_of"]
