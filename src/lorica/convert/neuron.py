"""Reading the adapters of Optimum Neuron: the shards of :mod:`lorica.checkpoint.neuron` as pairs of logical factors.

Its fused layers have one A for all of their projections, so those are one pair here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.checkpoint.neuron import Stage, find_shards, read_stages
from lorica.checkpoint.reading import check_finite
from lorica.config import CONFIG_NAME
from lorica.config.lora import check_fields
from lorica.convert.adapter import Adapter, Lazy, Pair, concatenated
from lorica.convert.fuse import apart
from lorica.convert.record import read_record
from lorica.convert.scales import scale_of
from lorica.errors import CheckpointError
from lorica.files.json import read_json_object
from lorica.layout.specs import PREFIX, Spec

_FACTOR = re.compile(r"(?P<owner>.+)\.lora_(?P<lookup>embedding_)?(?P<letter>[AB])(?:\.weight)?")
_METADATA_BYTES = 256 * 1024 * 1024
#: Name of a tensor without its letter and end → letter → tensor.
Halves = dict[str, dict[str, Lazy]]


def read_neuron_adapter(path: str | os.PathLike[str], *, first_copy: bool = False) -> Adapter:
    """Read an adapter that Optimum Neuron saved, as pairs of logical factors under transformers' names.

    Args:
        path: ``adapter_NAME/``, its ``adapter_shards/``, or a directory with one ``adapter_NAME/`` in it.
        first_copy: where ranks have different values for what they should share, take the first rank's, as Optimum
            Neuron's own consolidation does; otherwise that is an error.

    Returns:
        Factors that are put together when they are asked for.

    Raises:
        CheckpointError: something is missing, not readable, or no pair of factors.
        ConfigError: a field of the configuration has an impossible value.
        LayoutError: ranks disagree (when a factor is read).
    """
    found = {name: shards for name, shards in find_shards(path).items() if name}
    if len(found) != 1:
        raise CheckpointError(f"{path}: of the adapters {sorted(found)} give the directory of one")
    [(name, shards)] = found.items()
    folder = shards.parent
    config = read_json_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    check_fields(config, folder / CONFIG_NAME)
    record = read_record(folder)
    pairs = [pair for stage in read_stages(shards, name) for pair in _pairs(stage, config, first_copy)]
    if not pairs:
        raise CheckpointError(f"{shards}: no factors")
    kept = {**record, "neuron": {"name": name, "metadata": _metadata(shards), "config": config}}
    return Adapter(str(folder), apart(pairs, record), record.get("config", config), kept)


def _metadata(shards: Path) -> list[dict[str, Any]]:
    """Return what is said of each stage's factors, so that going back gives the same shards."""
    found: list[dict[str, Any]] = []
    while (path := shards / f"mp_metadata_pp_rank_{len(found)}.json").is_file():
        values = read_json_object(path, limit=_METADATA_BYTES)
        factors = {name: about for name, about in values["parameters"].items() if ".lora_" in name}
        found.append({**values, "parameters": factors})
    return found


def _pairs(stage: Stage, config: Mapping[str, Any], first_copy: bool) -> list[Pair]:
    halves: Halves = {}
    bases: dict[str, str] = {}
    groups: list[list[str]] = []
    for spec in stage.specs:
        layer = spec.local.removeprefix(PREFIX).rpartition(".lora_")[0]
        for name, lazy in _logical(spec, stage, first_copy).items():
            match = _FACTOR.fullmatch(name)
            if match is None:
                raise CheckpointError(f"{spec.local}: {name} is no factor; Optimum Neuron's adapters have only A and B")
            owner = match["owner"].removeprefix(PREFIX)
            halves.setdefault(owner, {})[f"{match['lookup'] or ''}{match['letter']}"] = lazy
            bases[owner] = layer
        if spec.also:
            groups.append([_owner(name) for name in (*spec.names, *spec.also)])
    alone = set(halves) - {name for group in groups for name in group}
    return [_pair(group, halves, bases, config) for group in (*groups, *([name] for name in halves if name in alone))]


def _logical(spec: Spec, stage: Stage, first_copy: bool) -> dict[str, Lazy]:
    """Return the logical tensors of a spec; each is put together of the ranks' when it is asked for."""
    local = stage.held[0][1][spec.local]

    def read(name: str) -> Tensor:
        held = [(at, tensors[spec.local]) for at, tensors in stage.held]
        tensor = spec.to_logical(held, first_copy=first_copy)[name]
        check_finite({name: tensor}, spec.local)
        return tensor

    shapes = spec.shapes(local.shape)
    return {name: Lazy(shape, local.dtype, partial(read, name)) for name, shape in shapes.items()}


def _owner(name: str) -> str:
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def _pair(names: list[str], halves: Halves, layers: Mapping[str, str], config: Mapping[str, Any]) -> Pair:
    """Return the pair of projections that share their A.

    Patterns of alphas count for the name of the layer that was trained: Optimum Neuron does not translate them to the
    projections of a fused one.
    """
    there = [halves[name] for name in names]
    lookup = "embedding_A" in there[0]
    letters = ("embedding_A", "embedding_B") if lookup else ("A", "B")
    for name, half in zip(names, there, strict=True):
        if set(half) != set(letters):
            raise CheckpointError(f"{name}: of A and B there is only {sorted(half)}")
    a, b = there[0][letters[0]], concatenated([half[letters[1]] for half in there])
    rows = tuple(half[letters[1]].shape[0] for half in there)
    return Pair(tuple(names), rows, a, b, scale_of(config, layers[names[0]], a.shape[0]), lookup)


__all__ = ["read_neuron_adapter"]
