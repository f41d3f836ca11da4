"""Putting values where an adapter's tensors live: many in one call, and without a copy where nobody has them yet."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.checkpoint.forms import FORMS
from lorica.checkpoint.names import Entry
from lorica.checkpoint.pieces import Piece, piece_of

_PLAIN = (Tensor, nn.Parameter)


class Place(enum.Enum):
    """What becomes of a live tensor when a file has a value for it."""

    TAKES_OVER = enum.auto()
    """It has no values yet and will be the file's tensor itself."""
    COPIES = enum.auto()
    """It is the file's tensor, whole and under one name; the value is written into it."""
    IN_PIECES = enum.auto()
    """It is another tensor than the file's: a part of it, or in other dimensions."""


def place_of(entry: Entry) -> Place:
    """Return what becomes of an entry's tensor."""
    tensor = entry.tensor
    if entry.site is not None or entry.window is not None or entry.roles in FORMS or type(tensor) not in _PLAIN:
        return Place.IN_PIECES
    if not tensor.is_meta:
        return Place.COPIES
    if entry.owner is None or entry.device is None or entry.device.type == "meta":
        return Place.IN_PIECES
    return Place.TAKES_OVER if entry.device.type == "cpu" else Place.COPIES


def take_over(entry: Entry, value: Tensor) -> Tensor:
    """Make ``value`` itself the tensor of an entry that has none yet, and return it as it is held."""
    assert entry.owner is not None
    leaf = entry.live[entry.live.rfind(".") + 1 :]
    old = entry.owner._parameters.get(leaf)
    if old is None:
        entry.owner._buffers[leaf] = value
        return value
    entry.owner._parameters[leaf] = made = nn.Parameter(value, old.requires_grad)
    if old.__dict__:
        made.__dict__.update(old.__dict__)  # what an engine noted on it
    return made


def materialised(entry: Entry, *, like: Callable[..., Tensor] = torch.zeros_like) -> Entry:
    """Give a factor that was put in without values memory on the device of its base layer.

    Args:
        like: ``torch.empty_like`` where all of it will be written.
    """
    if entry.owner is None or not entry.tensor.is_meta:
        return entry
    leaf = entry.live.rpartition(".")[2]
    held: Mapping[str, Any] = entry.owner._parameters if leaf in entry.owner._parameters else entry.owner._buffers
    tensor = held[leaf]  # another name of the same tensor may have given it memory
    if tensor.is_meta:
        tensor = take_over(entry, like(tensor, device=entry.device))
    return replace(entry, tensor=tensor)


def copy_whole(copies: Iterable[tuple[Entry, Tensor]]) -> None:
    """Write whole tensors into entries whose place is ``Place.COPIES``."""
    empty = torch.empty_like
    copy_all((materialised(entry, like=empty).tensor, value) for entry, value in copies)


def write_pieces(known: Mapping[str, Entry], parts: Mapping[str, list[Tensor]]) -> None:
    """Write what :meth:`Piece.read` returned.

    Args:
        known: name in a file → entry.
        parts: name in a file → values; of tied factors they are passed over, since their source has the same tensor.
    """
    written = [(piece_of(name, materialised(known[name])), parts[name]) for name in parts if not known[name].tied]
    copy_all([(goal, part) for piece, read in written for goal, part in zip(goals(piece), read, strict=True)])


def goals(piece: Piece) -> list[Tensor]:
    """Return the parts of this rank's tensor that :meth:`Piece.read` returns values for."""
    return [piece.tensor[box.local] for box in piece.boxes]


@torch.no_grad()
def copy_all(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy values into tensors of any dtype and device, given as pairs of a tensor and its new values."""
    together: tuple[list[Tensor], list[Tensor]] = ([], [])
    for goal, value in copies:
        if type(goal) in _PLAIN and type(value) in _PLAIN:
            together[0].append(goal)
            together[1].append(value)
        else:
            goal.copy_(value)
    if together[0]:
        torch._foreach_copy_(*together)
