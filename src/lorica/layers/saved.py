"""Modules that train fully beside the factors: one trainable copy per adapter (``modules_to_save``)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.engines.duplicate import duplicate
from lorica.layers.sharded import Sharded, state_of_copies
from lorica.layers.switch import Switch
from lorica.routing import BASE, Rows, each_group


class ModulesToSaveWrapper(Sharded):
    """Stands in the place of a module and runs the active adapter's copy of it, or the original.

    Args:
        original_module: the module of the base model; it stays as it is.
        switch: which adapters are on, shared with the other layers of the model.
        target_name: full name of the module in the base model, for messages.
    """

    inner = "original_module"

    def __init__(self, original_module: nn.Module, switch: Switch, target_name: str) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.switch = switch
        self.target_name = target_name

    def __getattr__(self, name: str) -> Any:
        """Look in the module that is in use for what this one does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}) or name.startswith("__"):
                raise
            return getattr(self.in_use(), name)

    def add_adapter(self, name: str, source: nn.Module | None = None) -> None:
        """Make a trainable copy for an adapter; with ``source``, one that shares that module's weight."""
        self.modules_to_save[name] = made = duplicate(self.original_module)
        if source is not None:
            made.weight = source.weight

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter's copy; one that is not there is no error."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def _own_state(self, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
        return state_of_copies(self, prefix, sharded_offsets, metadata)

    def in_use(self) -> nn.Module:
        """Return the first active adapter's copy, or the original."""
        if self.switch.enabled:
            for name in self.switch.active:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self._modules["original_module"]  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module that is in use, or for each row of a batch the copy of the row's adapter."""
        rows = self.switch.rows
        if rows is None or rows.names is None or not self.switch.enabled:
            return self.in_use()(*args, **kwargs)

        copies = self.modules_to_save
        mine = Rows([name if name in copies else BASE for name in rows.names])
        if len(mine.adapters) == 1:
            return self.of(mine.adapters[0])(*args, **kwargs)
        return each_group(mine, mine.adapters, lambda name, *a, **k: self.of(name)(*a, **k), args, kwargs)

    def of(self, name: str) -> nn.Module:
        """Return an adapter's copy, or the original where it has none."""
        copies = self.modules_to_save
        return copies[name] if name in copies else self._modules["original_module"]  # type: ignore[return-value]
