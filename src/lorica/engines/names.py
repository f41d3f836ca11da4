"""Logical names: those that modules have in the undivided model, where an engine counts them anew on every rank.

A pipeline stage of Megatron's calls its first layer ``layers.0``, whichever it is of all. Names in files, and what a
name seeds, must not depend on that. The engine notes at each list of modules which numbers its members have in all
(:func:`renumber`); those that look for targets and those that name tensors read the notes here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

_NOTE = "lorica_children"
_SOMEWHERE = "lorica_renumbered"


def renumber(model: nn.Module, parent: nn.Module, names: Mapping[str, str]) -> None:
    """Note the logical names of a module's children.

    Args:
        model: the base model, or the list of its chunks.
        parent: the module.
        names: name here → logical name; the empty one leaves a level out.
    """
    changed = {name: logical for name, logical in names.items() if name != logical}
    if changed:
        parent.__dict__[_NOTE] = changed
        model.__dict__[_SOMEWHERE] = True
    else:
        parent.__dict__.pop(_NOTE, None)


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """Yield the logical name and the module of each child."""
    note = module.__dict__.get(_NOTE)
    if note is None:
        yield from module._modules.items()
    else:
        yield from ((note.get(name, name), child) for name, child in module._modules.items())


def below(prefix: str, name: str) -> str:
    """Return the name of what is called ``name`` below ``prefix``; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def logical_names(model: nn.Module, base: nn.Module | None = None) -> Callable[[str], str]:
    """Return what turns names of a model's modules and tensors into logical ones; for many names it is made once.

    Args:
        model: adapted or not.
        base: the base model inside it, if it is known not to be the same.
    """
    if _SOMEWHERE not in (model if base is None else base).__dict__:
        return _same
    notes = [(name, module.__dict__[_NOTE]) for name, module in model.named_modules() if _NOTE in module.__dict__]

    def logical(name: str) -> str:
        # From the innermost outwards: a change of one level leaves the names above it as they are.
        for place, note in reversed(notes):
            start = len(place) + 1 if place else 0
            if name.startswith(f"{place}." if place else ""):
                child, _, rest = name[start:].partition(".")
                name = below(below(place, note.get(child, child)), rest)
        return name

    return logical


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module with a logical name.

    Raises:
        AttributeError: there is none.
    """
    found = dict(_walk(model, "", name)).get(name)
    return model.get_submodule(name) if found is None else found


def _walk(module: nn.Module, prefix: str, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules on the way to a name, and beside it where levels are left out."""
    for child_name, child in children_of(module):
        place = below(prefix, child_name)
        if child is not None and (place == name or name.startswith(f"{place}.") or not place):
            yield place, child
            yield from _walk(child, place, name)


def _same(name: str) -> str:
    return name


__all__ = ["below", "children_of", "logical_names", "renumber", "submodule"]
