"""Modules that are made by the hundred: those of adapted layers, and those below them that hold the factors.

Setting a module up attribute by attribute takes longer than drawing the factors of a small layer, and most of what
``nn.Module`` sets up are dictionaries of hooks that nobody ever attaches.
"""

from __future__ import annotations

from typing import Any

import torch.nn.modules.module as torch_modules
from torch import Tensor, nn

#: What ``nn.Module.__init__`` sets: empty containers, of which each module needs its own, and plain values.
_STATE = vars(nn.Module())
_CONTAINERS = {name: type(value) for name, value in _STATE.items() if isinstance(value, dict | set)}
_VALUES = {name: value for name, value in _STATE.items() if not isinstance(value, dict | set)}
#: Every call of a module looks into these.
_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_register_parameter = nn.Module.register_parameter


class _Later:
    """One of ``nn.Module``'s containers, which a module gets when somebody asks for it."""

    def __init__(self, name: str) -> None:
        self._name, self._kind = name, _CONTAINERS[name]

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        return self if module is None else module.__dict__.setdefault(self._name, self._kind())


class Light(nn.Module):
    """A module that has most of what ``nn.Module`` sets up only once somebody asks for it."""


for _name in _CONTAINERS.keys() - {"_parameters", "_buffers", "_modules"}:  # torch looks these up past descriptors
    setattr(Light, _name, _Later(_name))


def begin(module: Light) -> dict[str, Any]:
    """Do what ``nn.Module.__init__`` does, and return the module's ``__dict__``, into which attributes can be put that
    are no modules and no tensors: past ``nn.Module.__setattr__``, which takes longer than everything here."""
    state = module.__dict__
    state.update(_VALUES)
    state["_parameters"], state["_buffers"], state["_modules"] = {}, {}, {}
    return state


def begin_called(module: Light) -> dict[str, Any]:
    """Do the same for a module that is called."""
    state = begin(module)
    for name in _CALLED:
        state[name] = _CONTAINERS[name]()
    return state


class Factor(Light):
    """One factor of a product op, and the bias of B if it has one. It holds parameters; the op does the arithmetic."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        state = begin(self)
        _enter(self, "weight", weight)
        if bias is None:
            state["bias"] = None
        else:
            _enter(self, "bias", bias)

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


def _enter(factor: Factor, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter; where nobody listens to that, without checks of names that take longer than the rest."""
    if nn.Module.register_parameter is _register_parameter and not torch_modules._global_parameter_registration_hooks:
        factor._parameters[name] = parameter
    else:
        factor.register_parameter(name, parameter)


class Container(Light, nn.ModuleDict):
    """Modules by the names of adapters."""

    def __init__(self) -> None:
        begin(self)

    def _get_name(self) -> str:
        return "ModuleDict"


class Tensors(nn.Module):
    """Parameters or buffers by the names of adapters."""

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._parameters or name in self._buffers

    def __delitem__(self, name: str) -> None:
        delattr(self, name)


__all__ = ["Container", "Factor", "Light", "Tensors", "begin", "begin_called"]
