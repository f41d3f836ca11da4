"""Modules that are made by the hundred: those of adapted layers, and those below them that hold the factors.

Setting a module up attribute by attribute takes longer than drawing the factors of a small layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: What ``nn.Module.__init__`` sets: empty containers, of which each module needs its own, and plain values.
_STATE = vars(nn.Module())
_CONTAINERS = tuple((name, type(value)) for name, value in _STATE.items() if isinstance(value, dict | set))
_VALUES = {name: value for name, value in _STATE.items() if not isinstance(value, dict | set)}


def begin(module: nn.Module, **attributes: Any) -> None:
    """Do what ``nn.Module.__init__`` does, and set attributes that are no modules and no tensors, all at once."""
    state = module.__dict__
    state.update(_VALUES)
    for name, kind in _CONTAINERS:
        state[name] = kind()
    state.update(attributes)


class Factor(nn.Module):
    """One factor of a product op, and the bias of B if it has one. It holds parameters; the op does the arithmetic."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        begin(self, bias=None)
        self.register_parameter("weight", weight)
        if bias is not None:
            self.bias = bias

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


def module_dict() -> nn.ModuleDict:
    """Return an empty ``nn.ModuleDict``."""
    made: nn.ModuleDict = nn.ModuleDict.__new__(nn.ModuleDict)
    begin(made)
    return made


class Tensors(nn.Module):
    """Parameters or buffers by the names of adapters."""

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._parameters or name in self._buffers

    def __delitem__(self, name: str) -> None:
        delattr(self, name)


__all__ = ["Factor", "Tensors", "begin", "module_dict"]
