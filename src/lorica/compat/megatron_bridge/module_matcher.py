"""``megatron.bridge.peft.module_matcher``: which modules are meant."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from lorica.errors import ConfigError
from lorica.ops import op_of
from lorica.targets.match import entry_matches
from lorica.targets.walk import bare

#: What is adapted by default: all linear layers of Megatron's transformer layers.
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass
class ModuleMatcher:
    """Which modules of a model are meant.

    Attributes:
        target_modules: names of modules; one with ``*`` is matched against full names, from beginning to end.
        exclude_modules: with no target modules: all linear layers but these, matched alike.
        canonical_mapping: in place of target modules: names of modules, and of the projections in them that are meant.
    """

    target_modules: list[str] = field(default_factory=lambda: list(LINEARS))
    exclude_modules: list[str] = field(default_factory=list)
    canonical_mapping: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def match(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        """Return the entry that means a module, and the module's full name; None where none does.

        Args:
            m: the module.
            name: its name in the module that holds it.
            prefix: the full name of that one.

        Raises:
            ConfigError: there are both modules to adapt and modules to leave out.
        """
        if name is None:
            return None
        full_name = f"{prefix}.{name}" if prefix else name
        if (entries := self.entries()) is not None:
            found = next((entry for entry in entries if entry_matches(entry, full_name)), None)
            return None if found is None else (found, full_name)
        excluded = any(entry_matches(entry, full_name) for entry in self.exclude_modules or ())
        return (name, full_name) if is_linear(m) and not excluded else None

    def entries(self) -> list[str] | None:
        """Return the entries that name modules; None: all linear layers are meant but those that are excluded.

        Raises:
            ConfigError: there are both modules to adapt and modules to leave out.
        """
        entries = list(self.canonical_mapping or self.target_modules or ())
        if entries and self.exclude_modules:
            field_name = "canonical_mapping" if self.canonical_mapping else "target_modules"
            raise ConfigError(
                f"{type(self).__name__}: exclude_modules={self.exclude_modules} leaves modules out of all linear "
                f"layers, and {field_name}={entries} names some; set {field_name} to an empty list, or leave "
                "exclude_modules out"
            )
        return entries or None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that an adapter can be put on."""
    op = op_of(bare(module))
    return op is not None and op.kind == "Linear"
