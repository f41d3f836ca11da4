"""Copies of modules that an engine has wrapped."""

from __future__ import annotations

import copy
from types import CellType, FunctionType, MethodType
from typing import Any

import torch.distributed as dist
from torch import nn

from lorica.engines.kinds import is_distributed


def duplicate(module: nn.Module, *, share: bool = False) -> nn.Module:
    """Return a deep copy of a module that computes with its own parameters, or (``share``) with the same ones.

    Engines wrap a module's forward in functions that hold on to the module. Copying shares functions, so the copy's
    would compute with the original's parameters; they are made anew around the copy.
    """
    # A distributed tensor has no memory that could be copied; it is cloned.
    tensors = {
        id(parameter): parameter if share else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for parameter in module.parameters()
        if share or is_distributed(parameter)
    }
    kept = {id(value): value for inner in module.modules() for value in vars(inner).values() if _is_group(value)}
    copied = copy.deepcopy(module, {**tensors, **kept})
    for parameter, made in zip(module.parameters(), copied.parameters(), strict=True):
        for name, note in parameter.__dict__.items():  # what an engine noted on it
            if name != "main_grad":
                made.__dict__.setdefault(name, note)
    for old, new in zip(module.modules(), copied.modules(), strict=True):
        forward = new.__dict__.get("forward")
        if forward is not None:
            new.__dict__["forward"] = _rebound(forward, old, new)
    return copied


def _is_group(value: Any) -> bool:
    """Whether a value is a process group, of which there is one for all copies."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    if value is old:
        return new
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, FunctionType) and value.__closure__:
        cells = tuple(CellType(_rebound(cell.cell_contents, old, new)) for cell in value.__closure__)
        made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        return made
    return value
