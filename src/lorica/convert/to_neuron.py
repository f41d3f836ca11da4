"""Writing what Optimum Neuron reads: shards for each rank, and the metadata that say how they lie.

Its fused layers have one A, so projections with several are fused exactly (:mod:`lorica.convert.fuse`). It knows one
rank and one alpha for all layers: the names of its fused layers are not those of ``rank_pattern``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lorica.checkpoint.neuron import ADAPTER_SHARDS, write_shards
from lorica.config import CONFIG_NAME
from lorica.convert.adapter import Adapter, Lazy, Pair, tensors_of
from lorica.convert.fuse import Fused, Layer, fuse, padded, scaled
from lorica.convert.geometry import Geometry
from lorica.convert.to_peft import config_of, says, targets_of
from lorica.errors import ExportError
from lorica.files.atomic import write_json
from lorica.layout.specs import PREFIX

ADAPTER = "default"
_LAYER = re.compile(r"(?P<block>.+\.layers\.(?P<layer>\d+))\.(?P<leaf>.+)")
_COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_ROW = ("o_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")
Parameters = dict[str, dict[str, Any]]


class _Read(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and not kept."""

    def __init__(self, lazy: Mapping[str, Lazy]) -> None:
        self._lazy = lazy

    def __getitem__(self, name: str) -> Tensor:
        return self._lazy[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._lazy  # without reading it, as Mapping's own would

    def __iter__(self) -> Iterator[str]:
        return iter(self._lazy)

    def __len__(self) -> int:
        return len(self._lazy)


def write_neuron_adapter(
    adapter: Adapter,
    folder: Path,
    geometry: Geometry | None,
    *,
    rank: int | None = None,
    rounding: bool = False,
) -> Fused:
    """Fill a directory with an adapter in Optimum Neuron's form: ``adapter_default/``.

    Args:
        adapter: the adapter.
        folder: the directory, which is there.
        geometry: of the model: ``ranks`` and ``stages`` are those that are to load it. None: one rank, and q, k and v
            are layers of their own.
        rank: the largest rank of fused layers; None: nothing is lost.
        rounding: as in :func:`lorica.convert.fuse.scaled`.

    Returns:
        What was fused, and what that lost.

    Raises:
        ExportError: it cannot be written so.
    """
    if any(pair.magnitude is not None for pair in adapter.pairs):
        raise ExportError(f"{adapter.where}: Optimum Neuron's DoRA takes norms of shards; no file means the same to it")
    name = neuron_name(adapter)
    layout = _as_before(adapter, geometry) or _Division(geometry, name)
    done = fuse(adapter.pairs, layout.layer_of, rank=rank, rounding=rounding)
    largest, scale = max(pair.rank for pair in done.pairs), done.pairs[0].scale
    done.pairs = [padded(scaled(pair, scale, rounding=rounding), largest) for pair in done.pairs]
    place = folder / f"adapter_{name}"
    place.mkdir()
    stages = []
    for stage in range(layout.stages):
        mine = [pair for pair in done.pairs if layout.stage_of(pair.names[0]) == stage]
        if not mine:
            raise ExportError(
                f"{adapter.where}: pipeline rank {stage} of {layout.stages} would have nothing of the adapter"
            )
        lazy = {tensor.name: tensor.value for pair in mine for one in pair.split() for tensor in tensors_of(one)}
        stages.append((layout.metadata(mine), _Read(lazy)))
    write_shards(place / ADAPTER_SHARDS, stages, layout.ranks, name)
    singles = [single for pair in done.pairs for single in pair.split()]
    targets, before = targets_of(singles), adapter.kept.get("neuron", {}).get("config", {})
    own = dict(before) if says(before, targets, geometry) else config_of(adapter, targets, geometry)
    write_json(place / CONFIG_NAME, own)
    return done


def neuron_name(adapter: Adapter) -> str:
    """Return the name that an adapter has in Optimum Neuron's files: the one that it had there, or else "default"."""
    name = str(adapter.kept.get("neuron", {}).get("name", ADAPTER))
    return name if re.fullmatch(r"\w[\w-]*", name) else ADAPTER


class _Layout(Protocol):
    """How a model lies over ranks, and which of its layers are fused."""

    ranks: int
    stages: int

    def layer_of(self, name: str) -> Layer:
        """Return the layer that a projection is part of."""

    def stage_of(self, name: str) -> int:
        """Return the pipeline rank that has a layer."""

    def metadata(self, pairs: list[Pair]) -> Mapping[str, Any]:
        """Return what the file beside the shards says of one stage."""


def _as_before(adapter: Adapter, geometry: Geometry | None) -> _Layout | None:
    """Return the division that the adapter's own shards had, if it had any, and no other is wanted."""
    metadata = adapter.kept.get("neuron", {}).get("metadata")
    if not metadata:
        return None
    try:
        found = _Before(metadata)
        known = all(found.has(name) for pair in adapter.pairs for name in pair.names)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{adapter.where}: what is kept of its shards is broken: {error!r}") from error
    wanted = geometry is None or (geometry.ranks, geometry.stages) in ((1, 1), (found.ranks, found.stages))
    return found if known and wanted else None


class _Before:
    """The division that metadata describe."""

    def __init__(self, metadata: list[Any]) -> None:
        self._metadata, self.stages, self.ranks = metadata, len(metadata), 1
        self._layers: dict[str, Layer] = {}
        self._stages: dict[str, int] = {}
        for stage, values in enumerate(metadata):
            for module in values["model_weight_transformation_specs"]:
                block = module["module_fully_qualified_name"].removeprefix(PREFIX)
                for kind, fields in module["specs"]:
                    self._fused(kind, block, fields, stage)
            for name, about in values["parameters"].items():
                self._stages.setdefault(name.removeprefix(PREFIX).partition(".lora_")[0], stage)
                self.ranks = max(self.ranks, int(about.get("num_partitions", 1)))

    def _fused(self, kind: str, block: str, fields: Mapping[str, Any], stage: int) -> None:
        self.ranks = max(self.ranks, int(fields["tp_size"]))
        if kind == "FusedLinearsSpec":
            names, rows = fields["linear_names"], fields["original_dims"]
        else:
            names = [fields[f"{word}_projection_name"] for word in ("query", "key", "value")]
            q = fields["q_output_size_per_partition"] * fields["tp_size"]
            kv = q // fields["num_attention_heads"] * fields["num_key_value_heads"]
            rows = (q, kv, kv)
        layer = Layer(tuple(f"{block}.{name}" for name in names), tuple(rows))
        for name in layer.names:
            self._layers[name] = layer
            self._stages[name] = stage

    def has(self, name: str) -> bool:
        """Whether the metadata speak of a layer."""
        return name in self._stages

    def layer_of(self, name: str) -> Layer:
        return self._layers.get(name, Layer((name,)))

    def stage_of(self, name: str) -> int:
        return self._stages[name]

    def metadata(self, pairs: list[Pair]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._metadata[self.stage_of(pairs[0].names[0])]
        return found


class _Division:
    """How Optimum Neuron divides a model over ranks, and which of its layers it fuses."""

    def __init__(self, geometry: Geometry | None, name: str) -> None:
        self.geometry, self.name = geometry, name
        self.ranks = 1 if geometry is None else geometry.ranks
        self.stages = 1 if geometry is None else geometry.stages
        if geometry is not None and geometry.layers % geometry.stages:
            raise ExportError(f"{geometry.layers} layers do not divide over {geometry.stages} pipeline ranks")

    @property
    def qkv(self) -> str:
        """How q, k and v are kept: ``"apart"``, ``"fused"`` (as many key/value heads as query heads), ``"grouped"``."""
        if self.geometry is None:
            return "apart"
        if self.geometry.kv_heads < self.ranks:
            return "grouped"
        return "fused" if self.geometry.kv_heads == self.geometry.heads else "apart"

    def layer_of(self, name: str) -> Layer:
        """Return the layer that a projection is part of."""
        block, _, leaf = name.rpartition(".")
        if leaf in _QKV and block.endswith("self_attn") and self.qkv != "apart":
            assert self.geometry is not None
            return Layer(tuple(f"{block}.{part}" for part in _QKV), self.geometry.qkv)
        if leaf in ("gate_proj", "up_proj") and block.endswith(".mlp"):
            return Layer((f"{block}.gate_proj", f"{block}.up_proj"))
        return Layer((name,))

    def stage_of(self, name: str) -> int:
        """Return the pipeline rank that has a layer."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return self.stages - 1 if name.endswith("lm_head") else 0
        if self.geometry is None:
            return 0
        if int(match["layer"]) >= self.geometry.layers:
            raise ExportError(f"{name}: the model has {self.geometry.layers} layers")
        return int(match["layer"]) * self.stages // self.geometry.layers

    def metadata(self, pairs: list[Pair]) -> dict[str, Any]:
        """Return what the file beside the shards says of one stage."""
        parameters: Parameters = {}
        modules: dict[str, list[Any]] = {}
        for pair in pairs:
            block = pair.names[0].rpartition(".")[0]
            if len(pair.names) == 1:
                self._plain(pair, parameters)
            elif len(pair.names) == 2:
                self._fused(pair, f"{block}.gate_up_proj", parameters, modules)
            elif self.qkv == "fused":
                self._fused(pair, f"{block}.qkv_proj", parameters, modules)
            else:
                self._grouped(block, parameters, modules)
        specs = [{"module_fully_qualified_name": f"{PREFIX}{name}", "specs": inner} for name, inner in modules.items()]
        return {"parameters": parameters, "model_weight_transformation_specs": specs}

    def _cut(self, dim: int | None) -> dict[str, Any]:
        if dim is None:
            return {"tensor_model_parallel": False}
        about = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}
        return {**about, "num_partitions": self.ranks}

    def _enter(
        self, parameters: Parameters, layer: str, cuts: tuple[int | None, int | None], ends: tuple[str, ...]
    ) -> None:
        parameters[f"{PREFIX}{layer}.lora_A.{self.name}.weight"] = self._cut(cuts[0])
        for end in ends:
            parameters[f"{PREFIX}{layer}.lora_B.{self.name}.weight{end}"] = self._cut(cuts[1])

    def _plain(self, pair: Pair, parameters: Parameters) -> None:
        leaf = pair.name.rpartition(".")[2]
        column, row = leaf in _COLUMN, leaf in _ROW
        length = pair.b.shape[0] if column else pair.a.shape[1]
        if (column or row) and length % self.ranks:
            raise ExportError(f"{pair.name}: {length} does not divide over {self.ranks} ranks")
        if pair.lookup:
            parameters |= {f"{PREFIX}{pair.name}.lora_embedding_{x}.{self.name}": self._cut(None) for x in "AB"}
        else:
            self._enter(parameters, pair.name, (1 if row else None, 0 if column else None), ("",))

    def _fused(self, pair: Pair, layer: str, parameters: Parameters, modules: dict[str, list[Any]]) -> None:
        self._enter(parameters, layer, (None, 0), ("",))
        block, _, leaf = layer.rpartition(".")
        fields: dict[str, Any] = {"fused_linear_name": leaf}
        fields |= {"linear_names": [name.rpartition(".")[2] for name in pair.names]}
        fields |= {"bias": False, "fuse_axis": 0, "original_dims": list(pair.rows)}
        modules.setdefault(block, []).append(["FusedLinearsSpec", fields | self._common()])

    def _grouped(self, block: str, parameters: Parameters, modules: dict[str, list[Any]]) -> None:
        assert self.geometry is not None
        geometry = self.geometry
        copies = max(1, self.ranks // geometry.kv_heads)
        self._enter(parameters, f"{block}.qkv_proj", (None, 0), ("_q", "_k", "_v"))
        fields: dict[str, Any] = {"gqa_qkv_projection_name": "qkv_proj", "output_projection_name": "o_proj"}
        fields |= {f"{word}_projection_name": f"{word[0]}_proj" for word in ("query", "key", "value")}
        fields |= {"num_attention_heads": geometry.heads, "num_key_value_heads": geometry.kv_heads}
        fields |= {"kv_size_multiplier": copies, "fuse_qkv": False, "bias": False}
        fields["q_output_size_per_partition"] = geometry.heads * geometry.head_dim // self.ranks
        fields["kv_output_size_per_partition"] = geometry.kv_heads * geometry.head_dim * copies // self.ranks
        modules.setdefault(block, []).append(["GQAQKVColumnParallelLinearSpec", fields | self._common()])

    def _common(self) -> dict[str, Any]:
        return {"tp_size": self.ranks, "peft_type": "lora"}


__all__ = ["neuron_name", "write_neuron_adapter"]
