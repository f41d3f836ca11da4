"""Reading the adapters of Megatron Bridge: distributed checkpoints, whose tensors stack layers and experts.

::

    checkpoints/
        latest_checkpointed_iteration.txt
        iter_0000100/
            .metadata, __0_0.distcp, …     the factors
            run_config.yaml                the run: sections "peft" (LoRA's fields) and "model" (sizes)

A key is ``decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight``, of shape ``[layers, r, in]``, or has the
layer's number where layers differ. Experts come next: ``[layers, experts, r, in]``. ``linear_in`` is A, ``linear_out``
B. On a fused layer there is one pair, whose B has q, k and v in Megatron's order, query group by query group, and gate
before up; or a pair for each projection (``adapter.adapter_q``, of ``CanonicalLoRA``). DoRA has ``weight_magnitude``.

Of two tensors the order depends on the number of tensor-parallel ranks that saved them: the B of ``adapter_gate`` and
``adapter_up``, which are stored as if each were gate and up, and DoRA's magnitude of the fused layer, stored rank by
rank.
Source: ``megatron/bridge/peft/utils.py`` (``ParallelLinearAdapter.sharded_state_dict``), ``dora_layers.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.convert.adapter import Adapter, Lazy, Pair
from lorica.convert.dcp import METADATA, Distributed
from lorica.convert.families import Place, Slot, in_transformers, slot_named
from lorica.convert.fuse import apart
from lorica.convert.geometry import Geometry, geometry_of
from lorica.convert.record import read_record
from lorica.errors import CheckpointError, ExportError, LayoutError
from lorica.files.opening import open_regular, read_fully
from lorica.layout.neuron import number

RUN_CONFIG = "run_config.yaml"
LATEST = "latest_checkpointed_iteration.txt"
_KEY = re.compile(
    r"(?:(?:model|module)\.)*(?P<root>(?:language_model\.)?)"
    r"(?:decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<module>.+?)|(?P<outside>output_layer|embedding\.word_embeddings))"
    r"\.adapter\.(?:adapter_(?P<part>\w+?)\.)?(?P<leaf>linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
_EXPERTS = re.compile(r"mlp\.experts\.(?:(?:local_)?experts\.)?(?:(?P<expert>\d+)\.)?(?P<leaf>linear_fc[12])")
_LEAVES = {"linear_in.weight": "A", "linear_out.weight": "B", "weight_magnitude": "m"}
_MAX_LAYERS = 65536
_OPTIMISER = ("optimizer.", "chained_")


class Key(NamedTuple):
    """What a key of a checkpoint means.

    Attributes:
        root: prefix of the language model.
        layer: number; None: layers are stacked, or there is none.
        expert: number; None: experts are stacked, or there are none.
        module: the slot, or the layer outside.
        part: which projection of a fused layer; empty: all.
        outside: whether it is outside of the decoder.
    """

    root: str
    layer: int | None
    expert: int | None
    module: str
    part: str
    outside: bool


def read_bridge_adapter(
    path: str | os.PathLike[str], geometry: Geometry | None = None, *, expert_parallel: int | None = None
) -> Adapter:
    """Read an adapter that Megatron Bridge saved, as pairs of logical factors under transformers' names.

    Args:
        path: the directory of checkpoints, of which the latest is read, or that of one iteration.
        geometry: of the model; None: what ``run_config.yaml`` says.
        expert_parallel: expert-parallel ranks that saved it, for adapters that experts share: such a checkpoint may
            hold one pair for each rank, or one for all.

    Raises:
        CheckpointError: something is missing or not readable.
        ExportError: a layer is not known, or the model's sizes are needed and not said.
    """
    folder = find_iteration(Path(path))
    run = read_run_config(folder)
    peft: Mapping[str, Any] = run.get("peft") or {}
    said = _said_geometry(run)
    geometry = (
        geometry
        if said is None
        else said
        if geometry is None
        else replace(geometry, ranks=said.ranks, expert_ranks=said.expert_ranks)
    )
    record = read_record(folder)
    ranks = expert_parallel or _expert_ranks(run, folder)
    reader = _Reader(Distributed(folder), peft, geometry, ranks)
    pairs = [pair for key, leaves in reader.keys().items() for pair in reader.pairs(key, leaves)]
    if not pairs:
        ours = any(".lora_A." in key for key in reader.stored.tensors)
        hint = "; it has lorica's own, which `save_pretrained` of the adapted model writes as files" if ours else ""
        raise CheckpointError(f"{folder}: no factors of an adapter of Megatron Bridge's{hint}")
    said_of_run = {"peft": dict(peft), "model": dict(run.get("model") or {}), "joined": bool(record.get("joined"))}
    kept = {**record, "bridge": said_of_run}
    return Adapter(str(folder), apart(pairs, record), record.get("config", {}), kept)


def find_iteration(path: Path) -> Path:
    """Return the directory of the latest iteration, or of the one that is given.

    Raises:
        CheckpointError: there is none.
    """
    if (path / METADATA).is_file():
        return path
    if (path / LATEST).is_file():
        with open_regular(path / LATEST) as file:
            word = read_fully(file, 64).decode(errors="replace").strip()
        name = f"iter_{int(word):07d}" if word.isdecimal() else "release" if word == "release" else ""
        if name and (path / name / METADATA).is_file():
            return path / name
    found = [inner.parent for inner in path.glob(f"iter_*/{METADATA}")]
    if len(found) != 1:
        raise CheckpointError(f"{path}: no checkpoint of Megatron Bridge ({METADATA}, or iter_…/ with one) is here")
    return found[0]


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the run's configuration, from the checkpoint or the directory above; empty where there is none.

    Raises:
        CheckpointError: it is not readable as plain YAML.
    """
    from lorica.files.yaml import read_yaml

    for path in (folder / RUN_CONFIG, folder.parent / RUN_CONFIG):
        if not path.is_file():
            continue
        try:
            values = read_yaml(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: not plain YAML: {error}") from error
        if not isinstance(values, dict) or not all(isinstance(values.get(k) or {}, dict) for k in ("peft", "model")):
            raise CheckpointError(f"{path}: expected sections, found {type(values).__name__}")
        return values
    return {}


def _expert_ranks(run: Mapping[str, Any], folder: Path) -> int:
    try:
        return number((run.get("model") or {}).get("expert_model_parallel_size") or 1)
    except LayoutError as error:
        raise CheckpointError(f"{folder}: {RUN_CONFIG}: model.expert_model_parallel_size: {error}") from error


def _said_geometry(run: Mapping[str, Any]) -> Geometry | None:
    model = run.get("model") or {}
    return geometry_of(model) if "num_layers" in model and "num_attention_heads" in model else None


class _Reader:
    """Reads the tensors of one checkpoint."""

    def __init__(
        self, stored: Distributed, peft: Mapping[str, Any], geometry: Geometry | None, expert_parallel: int
    ) -> None:
        self.stored, self.peft, self.geometry, self.expert_parallel = stored, peft, geometry, expert_parallel
        self.where = str(stored.folder)

    def keys(self) -> dict[Key, dict[str, str]]:
        """Return what there are pairs of → letter → key in the checkpoint."""
        found: dict[Key, dict[str, str]] = {}
        for name in self.stored.tensors:
            match = _KEY.fullmatch(name)
            if match is None:
                if ".adapter." in name and "_extra_state" not in name and not name.startswith(_OPTIMISER):
                    raise CheckpointError(f"{self.where}: {name} is no factor that is known")
                continue
            module, expert = match["module"] or match["outside"], None
            if inner := _EXPERTS.fullmatch(module):
                module, expert = f"mlp.experts.{inner['leaf']}", inner["expert"]
            layer = match["layer"]
            key = Key(
                match["root"],
                None if layer is None else int(layer),
                None if expert is None else int(expert),
                module,
                match["part"] or "",
                match["outside"] is not None,
            )
            found.setdefault(key, {})[_LEAVES[match["leaf"]]] = name
        return found

    def pairs(self, key: Key, leaves: Mapping[str, str]) -> Iterator[Pair]:
        """Yield the pairs of all layers and experts of a key.

        Raises:
            CheckpointError: A or B is missing.
        """
        if not {"A", "B"} <= leaves.keys():
            raise CheckpointError(f"{self.where}: of {leaves} A or B is missing")
        gated = key.part in ("gate", "up") or self.geometry is None or self.geometry.gated
        slot = None if key.outside else slot_named(key.module, gated=gated)
        for layer, lead in self._layers(key, leaves["A"]):
            if slot is None and not key.outside:
                raise ExportError(f"{leaves['A']}: not known which of transformers' layers this is")
            if slot is None or not slot.is_expert:
                names = in_transformers(Place(key.root, layer, None, key.module), gated=gated)
                yield self._pair(key, leaves, names, lead, slot)
                continue
            for expert, inner in self._experts(key, leaves["A"], lead):
                names = in_transformers(Place(key.root, layer, expert, key.module), gated=gated)
                yield self._pair(key, leaves, names, inner, slot)

    def _layers(self, key: Key, name: str) -> Iterator[tuple[int | None, tuple[int, ...]]]:
        """Yield the number of each layer that has an adapter, and the indices that come first in its tensors."""
        if key.outside or key.layer is not None:
            yield key.layer, ()
            return
        shape = self.stored.tensors[name].shape
        if not shape or 0 in shape or shape[0] > _MAX_LAYERS:
            raise CheckpointError(f"{self.where}: {name} of shape {shape} is no stack of layers")
        for layer in range(shape[0]):
            if self.stored.there(name, (layer,)):
                yield layer, (layer,)

    def _experts(self, key: Key, name: str, lead: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the number of each expert, and the indices that come first in its tensors.

        Where experts share their pair, a checkpoint has a copy for each of them, one for each expert-parallel rank, or
        one for all.
        """
        if key.expert is not None:
            yield key.expert, lead
            return
        shape = self.stored.tensors[name].shape[len(lead) :]
        experts = 0 if self.geometry is None else self.geometry.experts
        stacked = len(shape) == 3
        pairs = shape[0] if stacked else 1
        if stacked and (not experts or pairs == experts):
            experts = pairs
        elif not experts:
            raise ExportError(f"{name}: the number of experts that share it is not said; the model's configuration is")
        elif pairs != self.expert_parallel:
            raise ExportError(
                f"{name}: {pairs} pair(s) for {experts} experts, shared by those of a rank. What Megatron Bridge means "
                "by that depends on the number of expert-parallel ranks: tell it (expert_parallel=, "
                "--expert-parallel), 1 if one pair is to be that of all experts"
            )
        if experts % pairs:
            raise CheckpointError(f"{name}: {pairs} pairs do not divide {experts} experts")
        for expert in range(experts):
            index = expert // (experts // pairs)
            yield expert, (*lead, index) if stacked else lead

    # ---- one pair ----------------------------------------------------------------------------------------------------

    def _pair(
        self, key: Key, leaves: Mapping[str, str], names: tuple[str, ...], lead: tuple[int, ...], slot: Slot | None
    ) -> Pair:
        parts = {letter: self.stored.lazy(name, lead) for letter, name in leaves.items()}
        if any(len(parts[letter].shape) != 2 for letter in "AB"):
            raise CheckpointError(f"{self.where}: {leaves['A']} and {leaves['B']} are no matrices")
        a, b, m = parts["A"], parts["B"], parts.get("m")
        scale = self._scale(leaves["A"], a.shape[0])
        if slot is None or not slot.parts:
            return Pair(names, (b.shape[0],), a, b, scale, magnitude=m)
        if key.part:
            if key.part not in slot.parts:
                raise CheckpointError(f"{self.where}: {leaves['A']} names no projection of {slot.module}")
            b = unhalved(b, self._ranks(slot)) if key.part in ("gate", "up") else b
            return Pair((names[slot.parts.index(key.part)],), (b.shape[0],), a, b, scale, magnitude=m)
        if len(names) == 2:
            half = b.shape[0] // 2
            return Pair(names, (half, half), a, b, scale, magnitude=m and by_halves(m, self._ranks(slot)))
        geometry = self._needed(leaves["B"])
        if b.shape[0] != sum(geometry.qkv):
            raise CheckpointError(f"{self.where}: {leaves['B']} has {b.shape[0]} rows, the model {sum(geometry.qkv)}")
        order = geometry.interleaved()
        return Pair(names, geometry.qkv, a, logical(b, order), scale, magnitude=m and logical(m, order))

    def _scale(self, name: str, rank: int) -> float:
        if rank < 1:
            raise CheckpointError(f"{self.where}: {name} has no rows")
        try:
            return float(self.peft["alpha"]) / rank
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.where}: {RUN_CONFIG} does not say peft.alpha, so {name} has no scale"
            ) from error

    def _needed(self, name: str) -> Geometry:
        if self.geometry is None:
            raise ExportError(
                f"{name}: q, k and v are one here; the model's configuration says how many heads there are"
            )
        return self.geometry

    def _ranks(self, slot: Slot) -> int:
        """Return how many tensor-parallel ranks saved a layer."""
        if self.geometry is None:
            return 1
        return self.geometry.expert_ranks if slot.is_expert else self.geometry.ranks


def unhalved(b: Lazy, ranks: int) -> Lazy:
    """Undo that each rank's rows of gate (or up) were stored as if they were a gate and an up."""
    return b if ranks == 1 else b.map(lambda t: t.view(2, ranks, -1, t.shape[-1]).transpose(0, 1).flatten(0, 2))


def by_halves(magnitude: Lazy, ranks: int) -> Lazy:
    """Undo that a vector of gate and up was stored rank by rank."""
    return magnitude if ranks == 1 else magnitude.map(lambda t: t.view(ranks, 2, -1).transpose(0, 1).flatten())


def logical(fused: Lazy, order: Tensor) -> Lazy:
    """Return rows in logical order, of those of which ``order`` says which logical row each is."""

    def change(tensor: Tensor) -> Tensor:
        result = torch.empty_like(tensor)
        result[order] = tensor
        return result

    return fused.map(change)


__all__ = ["LATEST", "RUN_CONFIG", "find_iteration", "read_bridge_adapter", "read_run_config"]
