"""Every tensor of a run's state as pieces of logical tensors: factors, the optimiser's state, random states."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.adapt.inject import base_of
from lorica.checkpoint.names import Entry, adapter_entries
from lorica.checkpoint.pieces import Piece, piece_of
from lorica.checkpoint.shards import Stored
from lorica.config import LoraConfig
from lorica.engines import fsdp
from lorica.engines.devices import accelerator, random_module
from lorica.errors import CheckpointError
from lorica.layout import Box

FACTORS = "factors/"
OPTIMIZER = "optimizer/"
RANDOM = "random/"
_WORDS_OF_NUMPY = 624


def entries(model: nn.Module) -> dict[str, Entry]:
    """What trains, by its names in an adapter's file; several where one tensor is saved in parts."""
    fsdp.reshard(base_of(model))
    found: dict[str, Entry] = {}
    configs: Mapping[str, LoraConfig] = getattr(base_of(model), "peft_config", {})
    for adapter, config in configs.items():
        for name, entry in adapter_entries(model, adapter, config).items():
            if not entry.tied:
                found[name if adapter == "default" else f"{adapter}/{name}"] = entry
    return found


def pieces(model: nn.Module, optimizer: Optimizer, rank: int) -> list[Piece]:
    """All pieces of this rank."""
    known = entries(model)
    return [*factors(known), *moments(known, optimizer), *random_states(rank)]


def factors(known: Mapping[str, Entry]) -> list[Piece]:
    """The pieces of the adapter."""
    return [piece_of(FACTORS + name, entry) for name, entry in known.items()]


def moments(known: Mapping[str, Entry], optimizer: Optimizer) -> list[Piece]:
    """The pieces of the optimiser's state, which lies as its parameters do."""
    found = []
    for name, entry, parameter in _trained(known, optimizer):
        for key, value in optimizer.state[parameter].items():
            found.append(_moment(f"{OPTIMIZER}{name}/{key}", entry, value))
    return found


def put_moments(known: Mapping[str, Entry], optimizer: Optimizer, index: Mapping[str, Stored]) -> list[Piece]:
    """Give the optimiser as much state as ``index`` has, all zero, and return the pieces of it, to be filled."""
    keys: dict[str, dict[str, Stored]] = {}
    for name, stored in index.items():
        if name.startswith(OPTIMIZER):
            owner, _, key = name.removeprefix(OPTIMIZER).rpartition("/")
            keys.setdefault(owner, {})[key] = stored
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, _, parameter in _trained(known, optimizer):
        for key, stored in keys.get(name, {}).items():
            like = (
                torch.zeros_like(parameter, dtype=stored.dtype) if stored.shape else torch.zeros((), dtype=stored.dtype)
            )
            states.setdefault(parameter, {})[key] = like
    current = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    current["state"] = {number: states[p] for number, p in enumerate(parameters) if p in states}
    optimizer.load_state_dict(current)  # which puts each on the device where it wants it
    return moments(known, optimizer)


def _trained(known: Mapping[str, Entry], optimizer: Optimizer) -> Iterator[tuple[str, Entry, Tensor]]:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = {id(entry.tensor) for entry in known.values()}
    if stepped - named:
        raise CheckpointError(f"{len(stepped - named)} parameters train that no file has a name for")
    for name, entry in known.items():
        if id(entry.tensor) in stepped:
            yield name, entry, entry.tensor


def _moment(name: str, entry: Entry, value: Tensor) -> Piece:
    if value.ndim:
        return piece_of(name, replace(entry, tensor=value))
    # One number for the whole tensor: whoever writes the tensor's first corner writes it.
    piece = piece_of(name, entry)
    corner = any(
        mine and all(side.start == 0 for side in box.logical)
        for box, mine in zip(piece.boxes, piece.owned, strict=True)
    )
    return Piece(name, torch.Size(), (Box((), ()),), value, (corner,))


# ---- random states ---------------------------------------------------------------------------------------------------


def random_states(rank: int) -> list[Piece]:
    """The pieces of this rank's generators of torch."""
    states = {"cpu": torch.get_rng_state()}
    if (kind := accelerator()) is not None and (module := random_module(kind)) is not None:
        states[kind] = module.get_rng_state()
    return [_own(f"{RANDOM}{rank}/{device}", state) for device, state in states.items()]


def random_pieces(index: Mapping[str, Stored], rank: int) -> list[Piece]:
    """Pieces to be filled with what a rank's generators were, as far as this process has such devices.

    They are as large as the states of its own generators are, whatever the index says.
    """
    return [piece for piece in random_states(rank) if piece.name in index]


def put_random_states(found: list[Piece]) -> None:
    """Set torch's generators as the pieces say."""
    for piece in found:
        kind = piece.name.rpartition("/")[2]
        if kind == "cpu":
            torch.set_rng_state(piece.tensor)
        else:
            random_module(kind).set_rng_state(piece.tensor)


def random_numbers() -> dict[str, Any]:
    """The states of Python's and numpy's generators as JSON values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    return {
        "python": [version, list(words), next_gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
    }


def put_random_numbers(numbers: Mapping[str, Any]) -> None:
    """Set Python's and numpy's generators.

    Raises:
        KeyError, TypeError, ValueError: these are no states of theirs.
    """
    if len(numbers["numpy"][1]) != _WORDS_OF_NUMPY:
        raise ValueError(f"numpy's generator has {_WORDS_OF_NUMPY} words, not {len(numbers['numpy'][1])}")
    version, words, next_gauss = numbers["python"]
    random.setstate((version, tuple(words), next_gauss))
    kind, keys, position, has_gauss, gauss = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))


def _own(name: str, tensor: Tensor) -> Piece:
    whole = tuple(slice(0, size) for size in tensor.shape)
    return Piece(name, tensor.shape, (Box(whole, whole),), tensor, (True,))
