"""What an export is made from, and what it gives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lorica.checkpoint import loading
from lorica.config import LoraConfig
from lorica.errors import ExportError
from lorica.export.saved import Saved, config_problems, read, skeleton, weight_problems


class Exported(NamedTuple):
    """What is written.

    Attributes:
        tensors: by their names in the file.
        config: the adapter's configuration for its new reader.
        notes: what a user has to know.
    """

    tensors: dict[str, Tensor]
    config: LoraConfig
    notes: list[str]


@dataclass(frozen=True)
class Source:
    """A saved adapter and what is asked of its export.

    Attributes:
        path: its directory.
        base: the base model, a directory or a name on the hub; None: the one it names.
        experts: ``"auto"``, ``"separate"`` (a pair for each expert) or ``"fused"`` (one for a stack).
        revision: of the base model that is given.
    """

    path: Path
    base: str | None = None
    experts: str = "auto"
    revision: str | None = None

    @cached_property
    def config(self) -> LoraConfig:
        """Its configuration."""
        return loading.read_config(self.path, None, {}, is_trainable=False)

    def base_model(self) -> tuple[str, str | None]:
        """Return the base model and its revision.

        Raises:
            ExportError: the adapter does not say what its base model is.
        """
        if self.base is not None:
            return self.base, self.revision
        if not self.config.base_model_name_or_path:
            raise ExportError(f"{self.path} does not name its base model; give it with --base")
        return os.fspath(self.config.base_model_name_or_path), self.config.revision

    @cached_property
    def saved(self) -> Saved:
        """The adapter, read."""
        return read(self.path, skeleton(*self.base_model()))

    def plain(self, target: str) -> Saved:
        """Return the adapter, if it is plain factors on linear layers, embeddings and experts, and nothing else.

        Raises:
            ExportError: it is not; every reason is named.
        """
        refuse(self.path, target, config_problems(self.config, target))
        refuse(self.path, target, weight_problems(self.saved, target))
        return self.saved


def refuse(path: Path, target: str, problems: list[str]) -> None:
    """Refuse an export for reasons, if there are any.

    Raises:
        ExportError: there are.
    """
    if problems:
        raise ExportError(f"{path} cannot be exported to {target}:" + "".join(f"\n  - {reason}" for reason in problems))
