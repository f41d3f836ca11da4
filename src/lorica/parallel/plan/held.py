"""What one rank holds between steps, what it sends once per step, and what it writes when the adapter is saved."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lorica.checkpoint.names import Entry, saved_entries
from lorica.checkpoint.pieces import piece_of
from lorica.config import LoraConfig
from lorica.engines.native.collectives import shares
from lorica.engines.site import Axis
from lorica.layers import LoraLayer
from lorica.model import get_peft_model
from lorica.parallel.plan.division import Division, divide, fake_ranks
from lorica.parallel.plan.outline import Outline
from lorica.parallel.plan.traffic import ring
from lorica.ranks import buckets

#: Name of the adapter in a plan.
ADAPTER = "default"


@dataclass(frozen=True)
class Cut:
    """A linear layer that tensor parallelism cuts.

    Attributes:
        by_rows: whether its input is divided, not its output.
        rank: r of its adapter.
        sizes: logical output and input.
        times: how many such layers there are.
    """

    by_rows: bool
    rank: int
    sizes: tuple[int, int]
    times: int


@dataclass(frozen=True)
class Held:
    """One rank, in bytes where nothing else is said.

    Attributes:
        weights: of the base model, as they are stored.
        factors: everything of the adapter that trains.
        trainable: elements of it.
        gathered: most that fully-sharded storage makes whole at once (an estimate: what is not sharded again after the
            forward, and two layers, one of which is fetched ahead).
        gathers: sent for that in one forward and backward.
        buckets: axis → sent once per step for gradients of the adapter.
        logical: elements of the adapter, whole, of this rank's stage.
        tensors: names that its stage has in the file.
        written: rank → number and bytes of the pieces it writes; the other ranks of the stage write nothing.
        cuts: the adapted linear layers that tensor parallelism cuts.
    """

    weights: int
    factors: int
    trainable: int
    gathered: int
    gathers: int
    buckets: dict[str, int]
    logical: int
    tensors: int
    written: dict[int, tuple[int, int]]
    cuts: tuple[Cut, ...]


def stage_layers(layers: int, division: Division, stage: int) -> range:
    """Return which decoder layers a pipeline stage has."""
    counts = shares(layers, division.pp)
    return range(sum(counts[:stage]), sum(counts[: stage + 1]))


@contextmanager
def adapted(
    outline: Outline, division: Division, stage: int, layers: Any, config: LoraConfig, *, stored_whole: bool = False
) -> Iterator[tuple[Any, list[Axis]]]:
    """Be the first rank of a stage, with its adapted model on the meta device; the axes of its meshes beside it."""
    with fake_ranks(division.stage_first(stage), division.ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = outline.build(layers)
        axes = divide(model, division, stored_whole=stored_whole)
        yield get_peft_model(model, config, ADAPTER, low_cpu_mem_usage=True), axes


def hold(outline: Outline, division: Division, stage: int, config: LoraConfig) -> Held:
    """Return what the first rank of a stage holds.

    Raises:
        LayoutError: the model cannot be divided so.
        TargetError: the adapter does not fit the model, or the stage has none of its targets.
    """
    counts = outline.counts(stage_layers(len(outline.kinds), division, stage))

    def times(name: str) -> int:
        return outline.times(name, counts)

    with adapted(outline, division, stage, counts, config) as (model, _):
        weights = factors = trainable = 0
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            local, number = _local(tensor), times(name)
            if tensor.requires_grad:
                factors += number * local.numel() * local.element_size()
                trainable += number * local.numel()
            else:
                weights += number * local.numel() * local.element_size()
        gathers, gathered = _storage(model.get_base_model(), times)
        entries = saved_entries(model, ADAPTER)
        return Held(
            weights=weights,
            factors=factors,
            trainable=trainable,
            gathered=gathered,
            gathers=gathers,
            buckets=_buckets(model, times),
            logical=sum(times(name) * entry.shape.numel() for name, entry in entries.items() if not entry.tied),
            tensors=sum(times(name) for name in entries),
            written=_written(entries, division, stage, times),
            cuts=tuple(_cuts(model, times)),
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(model: nn.Module, times: Callable[[str], int]) -> dict[str, int]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sent = {}
    for axis, parts in buckets(model):
        size = 4 * sum(times(names[id(parameter)]) * length for parameter, length in parts)
        sent[axis.name] = round(ring("all_reduce", axis.size, size))
    return sent


def _storage(base: Any, times: Callable[[str], int]) -> tuple[int, int]:
    """Return what fully-sharded storage sends in a forward and backward, and the most it makes whole at once."""
    sent, kept = 0.0, 0
    layers: Counter[str] = Counter()
    for name, module in base.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            if group is None:
                continue
            ranks = group.mesh_info.shard_mesh_size
            shard = sum(p._sharded_param_data.numel() * p._sharded_param_data.element_size() for p in group.fsdp_params)
            again = group.post_forward_mesh_info is not None and module is not base
            sent += times(f"{name}.") * (1 + again) * ring("all_gather", ranks, ranks * shard)
            if again:
                layers[".".join(name.split(".")[:3])] += ranks * shard
            else:
                kept += times(f"{name}.") * ranks * shard
    return round(sent), kept + 2 * max(layers.values(), default=0)


def _written(
    entries: dict[str, Entry], division: Division, stage: int, times: Callable[[str], int]
) -> dict[int, tuple[int, int]]:
    """Return what each rank writes that writes anything: the table of pieces as that rank would make it."""
    found = {}
    first = division.stage_first(stage)
    for rank in range(first, first + max(division.tp, division.ep)):
        at, number, size = division.at(rank), 0, 0
        for name, entry in entries.items():
            piece = piece_of(name, _as_seen_by(entry, at))
            if entry.site is None and rank:
                continue
            boxes = [box for box, mine in zip(piece.boxes, piece.owned, strict=True) if mine]
            elements = sum(_elements(box.logical) for box in boxes)
            number += times(name) * len(boxes)
            size += times(name) * elements * entry.tensor.element_size()
        if number:
            found[rank] = (number, size)
    return found


def _as_seen_by(entry: Entry, at: dict[str, int]) -> Entry:
    if entry.site is None:
        return entry
    axes = {name: replace(axis, rank=at[name]) for name, axis in entry.site.axes.items()}
    return replace(entry, site=replace(entry.site, axes=axes))


def _elements(box: tuple[slice, ...]) -> int:
    size = 1
    for side in box:
        size *= side.stop - side.start
    return size


def _cuts(model: nn.Module, times: Callable[[str], int]) -> Iterator[Cut]:
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or layer.site is None or layer.op.roles_weight != ("out", "in"):
            continue
        layout = layer.site.layout
        if any(cut.axis == "tp" for cut in layout.cuts):
            rank = layer.specs[ADAPTER].r
            by_rows = layout.cut_of("in") is not None
            yield Cut(by_rows, rank, (layout.sizes["out"], layout.sizes["in"]), times(name))


__all__ = ["ADAPTER", "Cut", "Held", "adapted", "hold", "stage_layers"]
