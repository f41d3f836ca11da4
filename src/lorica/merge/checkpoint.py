"""The files of one model, read parameter by parameter as transformers would load them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import CheckpointError
from lorica.files.tensors import TensorReader
from lorica.merge.follow import Conversion, skeleton
from lorica.merge.stream import weight_files


class Checkpoint:
    """A saved model of which one parameter at a time is in memory.

    Args:
        directory: with its configuration and its weights in safetensors files.

    Attributes:
        model: the model on the meta device.

    Raises:
        NotFollowedError: it has to be loaded to know its parameters; says why.
        CheckpointError: a file is broken.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        from transformers import AutoConfig

        self.directory = Path(directory)
        readers = [TensorReader(self.directory / name) for name in weight_files(self.directory)]
        self._readers = {key: reader for reader in readers for key in reader.tensors}
        self.model: Any = skeleton(AutoConfig.from_pretrained(self.directory, trust_remote_code=False))
        shapes = {key: reader.tensors[key].shape for key, reader in self._readers.items()}
        self._conversion = Conversion(self.model, shapes)
        self._same: dict[str, list[str]] = {}
        groups: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            groups[id(tensor)].append(name)
        for names in groups.values():
            self._same |= dict.fromkeys(names, names)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by its name; one that several modules share has the first one's."""
        return dict(self.model.named_parameters())

    def size(self, name: str) -> int:
        """Return the elements of a parameter."""
        return int(self.parameters[name].numel())

    def need(self, names: Iterable[str]) -> None:
        """Refuse to go on without knowing what these parameters are made of, of the right shape.

        Raises:
            NotFollowedError: it is not known.
            CheckpointError: the files have nothing for one, or something of another shape.
        """
        self._conversion.need([self._stored(name) for name in names], str(self.directory))

    def read(self, name: str, device: torch.device) -> Tensor:
        """Return a parameter in float32 (float64 stays)."""
        traced = self._conversion.parameters[self._stored(name)]
        result: Tensor | None = None
        for piece in traced.pieces:
            stored = self._readers[piece.key].read(piece.key)
            if not stored.is_floating_point():
                raise CheckpointError(f"{self.directory}: {piece.key} is stored as {stored.dtype}, a quantised weight")
            if result is None:
                wide = torch.promote_types(stored.dtype, torch.float32)
                result = torch.empty(tuple(traced.shape), dtype=wide, device=device)
            result[piece.box].copy_(piece.view(stored))  # in place: there is no third copy in between
            del stored
        assert result is not None
        low, high = result.aminmax()
        if not bool(low.isfinite() and high.isfinite()):
            raise CheckpointError(f"{self.directory}: {name} holds NaN or infinity")
        return result

    def _stored(self, name: str) -> str:
        """Return the name under which a parameter is stored, of those that mean it."""
        found = self._conversion.parameters
        return next((other for other in self._same.get(name, [name]) if other in found), name)

    def shared(self, name: str) -> bool:
        """Whether several modules have a parameter."""
        return len(self._same.get(name, ())) > 1


__all__ = ["Checkpoint"]
