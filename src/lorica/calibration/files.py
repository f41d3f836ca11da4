"""Files that keep what calibration found out: safetensors, never a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lorica.adapt.inject import base_of
from lorica.calibration import over_ranks
from lorica.errors import CheckpointError
from lorica.files.atomic import write_tensors
from lorica.files.opening import open_regular
from lorica.files.tensors import TensorReader

#: How files of ``torch.save`` begin: a zip archive, or a bare pickle.
_PICKLES = (b"PK\x03\x04", b"\x80")


def is_there(path: str | os.PathLike[str] | None) -> bool:
    """Whether a file is there to be read; the first rank's answer holds for all."""
    there = path is not None and os.path.exists(path) and os.path.getsize(path) > 0
    return over_ranks.first_says(there)


def read(path: str | os.PathLike[str], field: str) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Args:
        path: the file.
        field: what it was named by, for messages.

    Raises:
        CheckpointError: it is no safetensors file. A pickle can run code when it is loaded and is never read.
    """
    try:
        reader = TensorReader(path)
    except CheckpointError as error:
        with open_regular(path) as file:
            head = file.read(4)
        if head.startswith(_PICKLES):
            raise CheckpointError(
                f"{field}={os.fspath(path)!r} is a pickle (torch.save), which can run code when it is loaded, so "
                "lorica does not read it; give another name, and the file is made anew, as safetensors"
            ) from error
        raise
    return {name: reader.read(name) for name in reader.tensors}


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Write the tensors of all pipeline stages, in one step; the first rank does it."""
    everything = over_ranks.of_all_stages(base_of(model), {name: tensor.cpu() for name, tensor in tensors.items()})
    if over_ranks.is_first():
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_tensors(Path(path), {name: tensor.contiguous() for name, tensor in everything.items()}, {})


__all__ = ["is_there", "read", "write"]
