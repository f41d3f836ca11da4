"""Adapters and models as Optimum Neuron saves them: a folder of shards for each rank, read without its packages.

::

    adapter_{name}/adapter_config.json
    adapter_{name}/adapter_shards/mp_metadata_pp_rank_0.json     how the tensors of a pipeline stage lie
    adapter_{name}/adapter_shards/model/dp_rank_00_tp_rank_00_pp_rank_00.pt      what a rank has
    adapter_{name}/adapter_shards/{checkpoint,done}              there once all is written

A base model's folder is called ``shards``. With ``use_xser`` a rank's file only names its tensors by number; they lie
one by one in ``….pt.tensors/tensor_{number}.pt``. Nothing that is loaded can run code: only tensors, plain values and
those numbers are taken from pickles (:mod:`lorica.files.torch_files`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.checkpoint.reading import check_finite
from lorica.config import CONFIG_NAME, LoraConfig, PeftConfig
from lorica.errors import CheckpointError, LayoutError
from lorica.files.atomic import complete_directory, write_json
from lorica.files.json import read_json_object
from lorica.files.opening import refuse_links_out
from lorica.files.pickles import Record
from lorica.files.torch_files import read_torch_file
from lorica.layout.layout import At
from lorica.layout.neuron import specs_from_neuron, specs_to_neuron
from lorica.layout.specs import PREFIX, WeightSpecs
from lorica.targets.match import pattern_value

ADAPTER_SHARDS = "adapter_shards"
MODEL_SHARDS = "shards"
AXIS = "tp"
_FILE = re.compile(r"dp_rank_(\d+)_tp_rank_(\d+)_pp_rank_(\d+)(?:\.pt)?")
_DONE = "done"
_MAX_METADATA = 64 * 1024 * 1024
_MAX_NUMBER = 10**9
#: What torch_xla writes in a tensor's place when tensors are files of their own.
_REFERENCE = "torch_xla.utils.serialization.TensorReference"


class Stage(NamedTuple):
    """One pipeline stage of a saved model or adapter.

    Attributes:
        specs: how its tensors lie.
        held: coordinate and tensors of each rank.
    """

    specs: WeightSpecs
    held: list[tuple[At, dict[str, Tensor]]]


def find_shards(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the folders of shards: adapter's name → folder; ``""`` is the base model.

    Args:
        directory: what was saved into, the folder of one adapter, or a folder of shards itself.

    Raises:
        CheckpointError: there is none.
    """
    place = Path(directory)
    if (place / "model").is_dir():
        adapter = place.name == ADAPTER_SHARDS or place.parent.name.startswith("adapter_")
        return {_adapter(place.parent) if adapter else "": place}
    if (place / ADAPTER_SHARDS).is_dir():
        return {_adapter(place): place / ADAPTER_SHARDS}
    folders = sorted(place.glob(f"adapter_*/{ADAPTER_SHARDS}")) if place.is_dir() else []
    found = {_adapter(shards.parent): shards for shards in folders}
    if (place / MODEL_SHARDS).is_dir():
        found[""] = place / MODEL_SHARDS
    if not found:
        raise CheckpointError(f"{place}: no {ADAPTER_SHARDS} of an adapter and no {MODEL_SHARDS} of a model are here")
    return found


def read_shards(
    shards: str | os.PathLike[str], adapter: str | None = None, *, first_copy: bool = False
) -> dict[str, Tensor]:
    """Return the logical tensors of a folder of shards, under the names that they have in PEFT's or the model's files.

    Args:
        shards: the folder.
        adapter: whose tensors these are; None: a base model's, or the metadata name one adapter only.
        first_copy: take what the first rank has where ranks differ in what they should have alike.

    Raises:
        CheckpointError: a file is missing or not what it should be, holds NaN, saving was not finished, or ranks differ
            and ``first_copy`` is false.
    """
    found: dict[str, Tensor] = {}
    for number, stage in enumerate(read_stages(shards, adapter)):
        try:
            tensors = stage.specs.to_logical(stage.held, first_copy=first_copy)
        except LayoutError as error:
            advice = ""
            if "differs" in str(error):
                advice = (
                    ". Under sequence parallelism Optimum Neuron trained a different copy on every rank; "
                    "first_copy=True takes the first rank's, as its own consolidation does"
                )
            raise CheckpointError(f"{shards}, stage {number}: {error}{advice}") from error
        check_finite(tensors, str(shards))
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{shards}: in more than one stage: {sorted(twice)[:5]}")
        found |= tensors
    return found


def read_stages(shards: str | os.PathLike[str], adapter: str | None = None) -> Iterator[Stage]:
    """Yield the pipeline stages of a folder of shards; for arguments and errors see :func:`read_shards`."""
    place = Path(shards)
    if not (place / _DONE).is_file():
        raise CheckpointError(
            f"{place}: not finished, {_DONE!r} is missing; another checkpoint of the run may be whole"
        )
    files = _files(place)
    for stage, ranks in enumerate(files):
        metadata = _read_metadata(place, stage)
        held: list[tuple[At, dict[str, Tensor]]] = [
            ({AXIS: rank}, _load(file, place)) for rank, file in enumerate(ranks)
        ]
        shapes = {name: tensor.shape for name, tensor in held[0][1].items()}
        try:
            specs = specs_from_neuron(metadata, shapes, axis=AXIS, adapter=adapter, ranks=len(ranks))
        except LayoutError as error:
            raise CheckpointError(f"{place}, stage {stage}: {error}") from error
        yield Stage(specs, held)


def read_config(
    shards: str | os.PathLike[str], tensors: Mapping[str, Tensor], adapter: str | None = None
) -> LoraConfig:
    """Return the configuration beside an adapter's shards, as it was trained.

    Optimum Neuron does not translate patterns of ranks and alphas to the names of its fused layers, so there they had
    no effect on projections that are fused. What is returned says what each of them really has.

    Args:
        shards: the folder.
        tensors: what :func:`read_shards` found in it.
        adapter: as there.

    Raises:
        CheckpointError: there is none, or it is of another method.
    """
    place = Path(shards).parent
    if not (place / CONFIG_NAME).is_file():
        raise CheckpointError(f"{place}: {CONFIG_NAME} is missing")
    config = PeftConfig.from_pretrained(place)
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{place}: an adapter of {config.peft_type}; lorica adapts by LoRA")
    if not (config.rank_pattern or config.alpha_pattern):
        return config
    ranks = {name.removesuffix(".lora_B.weight"): t.shape[1] for name, t in tensors.items() if ".lora_B." in name}
    for owner, fused in _fused_in(shards, adapter).items():
        name = owner.removeprefix(PREFIX)
        trained = ranks.get(owner, config.r), pattern_value(config.alpha_pattern, fused, config.lora_alpha)
        if pattern_value(config.rank_pattern, name, config.r) != trained[0]:
            config.rank_pattern = {f"^{re.escape(name)}": trained[0], **(config.rank_pattern or {})}
        if pattern_value(config.alpha_pattern, name, config.lora_alpha) != trained[1]:
            config.alpha_pattern = {f"^{re.escape(name)}": trained[1], **(config.alpha_pattern or {})}
    return config


def write_shards(
    shards: str | os.PathLike[str],
    stages: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]],
    ranks: int,
    adapter: str | None = None,
) -> None:
    """Write a folder of shards that Optimum Neuron reads.

    Args:
        shards: the folder, which must not be there.
        stages: metadata and logical tensors (named as in files) of each pipeline stage. Those of a mapping that reads
            when it is asked are in memory one spec at a time: a rank's file is put together on the disk.
        ranks: tensor-parallel ranks.
        adapter: whose tensors they are, as the metadata name it.

    Raises:
        CheckpointError: a tensor does not fit the metadata, or projections that have one A there have different ones.
        FileExistsError: the folder is there.
    """
    with complete_directory(shards, marker=False) as place:
        (place / "model").mkdir()
        for stage, (metadata, tensors) in enumerate(stages):
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            try:
                specs = specs_to_neuron(metadata, shapes, axis=AXIS, adapter=adapter, ranks=ranks)
                for rank in range(ranks):
                    path = place / "model" / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_{stage:02d}.pt"
                    _save(specs.each_local(tensors, {AXIS: rank}), path)
            except LayoutError as error:
                raise CheckpointError(f"{shards}, stage {stage}: {error}") from error
            write_json(place / f"mp_metadata_pp_rank_{stage}.json", metadata)
        for name in ("checkpoint", _DONE):
            (place / name).write_text("1")


def _save(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write ``torch.save``'s file of tensors that come one after the other.

    It takes them all at once, so each is put into a file of its own beside it first, and is mapped from there.
    """
    scratch = path.with_suffix(".parts")
    scratch.mkdir()
    state: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(tensors):
        if not tensor.numel():  # which cannot be mapped
            state[name] = tensor
            continue
        place = str(scratch / str(number))
        mapped = torch.from_file(place, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        state[name] = mapped.view(tensor.shape).copy_(tensor)
    torch.save(state, path)
    del state
    shutil.rmtree(scratch)


def _adapter(folder: Path) -> str:
    return folder.name.removeprefix("adapter_")


def _fused_in(shards: str | os.PathLike[str], adapter: str | None) -> dict[str, str]:
    """Return for each projection that is fused where it was trained the full name of the layer it was fused in."""
    found: dict[str, str] = {}
    for stage in read_stages(shards, adapter):
        for spec in stage.specs:
            names = [*spec.names, *spec.also]
            owners = [name.rpartition(".lora_")[0] for name in names if ".lora_" in name]
            layer = spec.local.rpartition(".lora_")[0].removeprefix(PREFIX)
            found |= {owner: layer for owner in owners if owner.removeprefix(PREFIX) != layer}
    return found


def _files(place: Path) -> list[list[Path]]:
    """Return the ranks' files of each pipeline stage; of data-parallel replicas the first."""
    found: dict[tuple[int, int], tuple[int, Path]] = {}
    for path in sorted((place / "model").iterdir() if (place / "model").is_dir() else ()):
        if (match := _FILE.fullmatch(path.name)) and path.is_file():
            replica, rank, stage = map(int, match.groups())
            found.setdefault((stage, rank), (replica, path))
    if not found:
        raise CheckpointError(f"{place / 'model'}: no shards (dp_rank_00_tp_rank_00_pp_rank_00.pt …) are here")
    stages, ranks = (1 + max(key[dim] for key in found) for dim in (0, 1))
    for stage in range(stages):
        for rank in range(ranks):
            if (stage, rank) not in found:
                raise CheckpointError(f"{place / 'model'}: the shard of rank {rank}, stage {stage}, is missing")
    return [[found[stage, rank][1] for rank in range(ranks)] for stage in range(stages)]


def _read_metadata(place: Path, stage: int) -> Mapping[str, Any]:
    for name in (f"mp_metadata_pp_rank_{stage}.json", f"mp_metadata_pp_rank_{stage:02d}.json"):
        if (place / name).is_file():
            return read_json_object(place / name, limit=_MAX_METADATA)
    pickled = place / f"mp_metadata_pp_rank_{stage}.pt"
    if not pickled.is_file():
        raise CheckpointError(f"{pickled.with_suffix('.json')} is missing: how the shards lie is not known")
    metadata = _unpickled(pickled, place)
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{pickled}: expected a dictionary, found {type(metadata).__name__}")
    return metadata


# ---- files of torch --------------------------------------------------------------------------------------------------


def _unpickled(path: Path, place: Path) -> Any:
    refuse_links_out(path, place)
    try:
        return read_torch_file(path, also=(_REFERENCE,))
    except CheckpointError as error:
        raise CheckpointError(f"not a file of tensors and plain values: {error}") from error


def _load(path: Path, place: Path) -> dict[str, Tensor]:
    state = _unpickled(path, place)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = _referred(path, value, place) if isinstance(value, Record) else value
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
        found[name] = tensor
    return found


def _referred(path: Path, reference: Record, place: Path) -> Any:
    number = reference.fields.get("tid")
    if type(number) is not int or not 0 <= number < _MAX_NUMBER:
        raise CheckpointError(f"{path}: {number!r} is no number of a tensor")
    return _unpickled(path.with_name(f"{path.name}.tensors") / f"tensor_{number}.pt", place)


__all__ = [
    "ADAPTER_SHARDS",
    "MODEL_SHARDS",
    "Stage",
    "find_shards",
    "read_config",
    "read_shards",
    "read_stages",
    "write_shards",
]
