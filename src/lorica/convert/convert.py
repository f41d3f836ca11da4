"""``convert_adapter``: from the files of one system to those of another."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorica.checkpoint.names import WEIGHTS_NAME
from lorica.config.expressions import one_search
from lorica.convert.adapter import Adapter
from lorica.convert.fuse import Fused
from lorica.convert.geometry import Geometry, as_megatron, geometry_of, known_geometry
from lorica.convert.megatron import read_bridge_adapter
from lorica.convert.neuron import read_neuron_adapter
from lorica.convert.peft import read_peft_adapter
from lorica.convert.record import write_record
from lorica.convert.to_megatron import write_bridge_adapter
from lorica.convert.to_neuron import neuron_name, write_neuron_adapter
from lorica.convert.to_peft import write_peft_adapter
from lorica.errors import CheckpointError, ExportError, suggest
from lorica.files.atomic import complete_directory

SYSTEMS = ("peft", "megatron-bridge", "neuron")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        layers: adapted layers, by transformers' names, that were read.
        rank: the largest rank that was written.
        fused: how many layers were put together from pairs with several A's.
        errors: what truncation lost of each such layer, relative to the norm of its delta; empty: nothing was lost.
        notes: what else a user has to know.
    """

    layers: int
    rank: int
    fused: int
    errors: dict[str, float]
    notes: tuple[str, ...]


@one_search()
def convert_adapter(
    adapter: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    source: str,
    target: str,
    model: Any = None,
    form: str = "auto",
    experts: str = "auto",
    names: str = "transformers",
    rank: int | None = None,
    rounding: bool = False,
    tensor_parallel: int | None = None,
    pipeline_parallel: int | None = None,
    expert_parallel: int | None = None,
    first_copy: bool = False,
) -> Conversion:
    """Convert an adapter; the directory appears once it is complete.

    Args:
        adapter: where it is.
        directory: where it goes; must not exist yet.
        source: ``"peft"``, ``"megatron-bridge"`` or ``"neuron"``. A directory that lorica saved from Megatron's
            layers is read with either of the first two.
        target: likewise.
        model: the model's directory, ``config.json``, or configuration, of which only sizes are read: needed where q, k
            and v are fused on one side only, and not known from the files.
        form: for Megatron Bridge: ``"fused"`` (``LoRA``), ``"canonical"`` (``CanonicalLoRA``), or ``"auto"``.
        experts: for PEFT: ``"stacked"``, ``"separate"``, or ``"auto"``.
        names: for PEFT: ``"transformers"``, or ``"megatron"`` for lorica on Megatron's layers.
        rank: the largest rank of a layer whose projections have to share one A and do not: it is cut to the nearest
            adapter of this rank, and the result says what was lost. None: the ranks are added up, and nothing is lost.
        rounding: let scales that differ between layers be multiplied into B where the target knows only one.
        tensor_parallel: ranks that the target's files are for; None: as they were, or 1.
        pipeline_parallel: likewise, of Optimum Neuron's files.
        expert_parallel: ranks by which Megatron Bridge saved experts that share an adapter.
        first_copy: of Optimum Neuron's ranks that differ where they should not, the first is right.

    Raises:
        ExportError: the target cannot hold the adapter, or the model's configuration is needed.
        CheckpointError: a file is broken or missing, or the directory exists.
    """
    for word in (source, target):
        if word not in SYSTEMS:
            raise ExportError(f"no format {word!r}.{suggest(word, SYSTEMS)} Known: {', '.join(SYSTEMS)}")
    for name, word, known in (
        ("experts", experts, ("auto", "stacked", "separate")),
        ("names", names, ("transformers", "megatron")),
    ):
        if word not in known:
            raise ExportError(f"{name}={word!r}: expected one of {', '.join(known)}")
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory} already exists; choose another directory")
    found = read_adapter(adapter, source, model=model, expert_parallel=expert_parallel, first_copy=first_copy)
    geometry = _divided(known_geometry(model, found.kept, found.config), tensor_parallel, pipeline_parallel)
    with complete_directory(directory, marker=False) as temporary:
        if target == "megatron-bridge":
            done = write_bridge_adapter(found, temporary, geometry, form=form, rank=rank, rounding=rounding)
        elif target == "neuron":
            done = write_neuron_adapter(found, temporary, geometry, rank=rank, rounding=rounding)
        else:
            done = write_peft_adapter(
                found, temporary, geometry, experts=experts, names=names, rank=rank, rounding=rounding
            )
        inner = {"megatron-bridge": "iter_0000000", "neuron": f"adapter_{neuron_name(found)}"}.get(target, "")
        config = {} if target == "peft" and names == "transformers" else found.config
        sizes = {} if geometry is None else as_megatron(geometry)
        write_record(temporary / inner, {**found.kept, "config": config, "model": sizes, "joined": done.record()})
    return _said(found, done)


def read_adapter(
    adapter: str | os.PathLike[str],
    source: str,
    *,
    model: Any = None,
    expert_parallel: int | None = None,
    first_copy: bool = False,
) -> Adapter:
    """Read an adapter of any system; for arguments and errors see :func:`convert_adapter`."""
    geometry = None if model is None else geometry_of(model)
    if source == "neuron":
        return read_neuron_adapter(adapter, first_copy=first_copy)
    if source == "peft" or Path(adapter, WEIGHTS_NAME).is_file():
        return read_peft_adapter(adapter, geometry)
    return read_bridge_adapter(adapter, geometry, expert_parallel=expert_parallel)


def _divided(geometry: Geometry | None, ranks: int | None, stages: int | None) -> Geometry | None:
    if geometry is None:
        if (ranks or 1) > 1 or (stages or 1) > 1:
            raise ExportError("how a model lies over ranks needs its configuration; give it (model=, --model)")
        return None
    return replace(geometry, ranks=ranks or geometry.ranks, stages=stages or geometry.stages)


def _said(adapter: Adapter, done: Fused) -> Conversion:
    several = [names for names, blocks in done.blocks.items() if len(blocks) > 1]
    notes = list(adapter.notes)
    if several:
        notes.append(
            f"{len(several)} layers have one A for several projections there; their ranks were added up, which is exact"
        )
    ranks = [pair.rank for pair in done.pairs] or [adapter.rank]
    layers = sum(len(pair.names) for pair in adapter.pairs)
    return Conversion(layers, max(ranks), len(several), done.errors, tuple(notes))


__all__ = ["SYSTEMS", "Conversion", "convert_adapter", "read_adapter"]
