"""peft itself, where it is installed: what checks for its classes is to take ours.

transformers, accelerate and TRL ask ``isinstance(model, peft.PeftModel)`` and the like. So each class of ours that they
ask about also inherits from peft's, in name only: a shield stands between the two and hides everything that peft's
class has, so that a lookup finds what it finds where peft is not installed. Nothing of peft's runs on our state.

``peft.get_peft_model`` and ``peft.inject_adapter_in_model``, which TRL and transformers call themselves, construct
``peft.PeftModel`` and ``peft.LoraModel``. With a configuration of ours these two give way to our classes
(:func:`give_way`); with one of peft's own they are what they were, until :func:`take_over` is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from types import ModuleType
from typing import Any

from torch import nn

try:
    import peft as _peft
except ImportError:  # everything but the integrations works without
    _peft = None

library: ModuleType | None = _peft

#: What a class says of itself or of its subclasses, not of its instances.
_OF_THE_CLASS = {"__module__", "__doc__", "__dict__", "__new__", "__init_subclass__", "__subclasshook__", "_abc_impl"}


class _Hidden:
    """An attribute that is not there, so that ``__getattr__`` is asked."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")


def foreign(path: str) -> type | None:
    """Return peft's class at ``path`` (``"PeftModel"``), or None where peft is not installed or has none there."""
    try:
        return None if library is None else attrgetter(path)(library)
    except AttributeError:
        return None


def beneath(path: str) -> tuple[type, ...]:
    """Return the last base classes of a module of ours that is to be an instance of peft's class at ``path``.

    They are the shield and peft's class; none where there is no peft.
    """
    theirs = foreign(path)
    if theirs is None:
        return ()
    hidden: dict[str, Any] = {}
    for base in theirs.__mro__:
        for name in () if base in nn.Module.__mro__ else set(vars(base)) - _OF_THE_CLASS:
            plain = inspect.getattr_static(nn.Module, name, None)
            if plain is not None or not name.startswith("__"):
                hidden[name] = _Hidden() if plain is None else plain
    return type(theirs)(f"Not{theirs.__name__}", (nn.Module,), hidden), theirs


def give_way(path: str, choose: Callable[[type, Any], type]) -> None:
    """Let peft's class at ``path`` construct what ``choose(class, configuration)`` names; nothing without peft.

    Python then calls the chosen class's ``__init__``, since it inherits from peft's.
    """
    theirs = foreign(path)
    if theirs is None:
        return

    def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
        named = [kwargs[name] for name in ("peft_config", "config") if name in kwargs]
        config = args[1] if len(args) > 1 else next(iter(named), None)
        if isinstance(config, dict) and config:
            config = next(iter(config.values()))
        return object.__new__(choose(cls, config))

    theirs.__new__ = staticmethod(construct)  # type: ignore[assignment]
