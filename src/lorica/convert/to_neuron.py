"""Writing what Optimum Neuron reads: shards for each rank, and the metadata that say how they lie.

Its fused layers have one A, so projections with several are fused exactly (:mod:`lorica.convert.fuse`). It knows one
rank and one alpha for all layers: the names of its fused layers are not those of ``rank_pattern``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.checkpoint.neuron import ADAPTER_SHARDS, write_shards
from lorica.config import CONFIG_NAME
from lorica.convert.adapter import Adapter, Lazy, Pair, tensors_of
from lorica.convert.fuse import Fused, Layer, fuse, padded, scaled
from lorica.convert.geometry import Geometry
from lorica.convert.to_peft import config_of, targets_of
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
    layout = _Division(geometry)
    done = fuse(adapter.pairs, layout.layer_of, rank=rank, rounding=rounding)
    largest, scale = max(pair.rank for pair in done.pairs), done.pairs[0].scale
    done.pairs = [padded(scaled(pair, scale, rounding=rounding), largest) for pair in done.pairs]
    place = folder / f"adapter_{ADAPTER}"
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
    write_shards(place / ADAPTER_SHARDS, stages, layout.ranks, ADAPTER)
    singles = [single for pair in done.pairs for single in pair.split()]
    write_json(place / CONFIG_NAME, config_of(adapter, targets_of(singles), geometry))
    return done


class _Division:
    """How Optimum Neuron divides a model over ranks, and which of its layers it fuses."""

    def __init__(self, geometry: Geometry | None) -> None:
        self.geometry = geometry
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
        layers = self.stages if self.geometry is None else self.geometry.layers
        return int(match["layer"]) * self.stages // layers

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
        parameters[f"{PREFIX}{layer}.lora_A.{ADAPTER}.weight"] = self._cut(cuts[0])
        for end in ends:
            parameters[f"{PREFIX}{layer}.lora_B.{ADAPTER}.weight{end}"] = self._cut(cuts[1])

    def _plain(self, pair: Pair, parameters: Parameters) -> None:
        leaf = pair.name.rpartition(".")[2]
        column, row = leaf in _COLUMN, leaf in _ROW
        length = pair.b.shape[0] if column else pair.a.shape[1]
        if (column or row) and length % self.ranks:
            raise ExportError(f"{pair.name}: {length} does not divide over {self.ranks} ranks")
        if pair.lookup:
            parameters |= {f"{PREFIX}{pair.name}.lora_embedding_{x}.{ADAPTER}": self._cut(None) for x in "AB"}
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


__all__ = ["write_neuron_adapter"]
