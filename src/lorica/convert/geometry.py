"""What a conversion has to know of a model besides its names: heads, layers, experts. No weights, no classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.errors import ExportError, LoricaError
from lorica.files.json import read_json_object

#: No model has more layers, heads, experts or ranks, or a larger head: what files say is counted through.
_MOST = 65536
#: Model types whose MLP has no gate.
_WITHOUT_GATE = frozenset({"nemotron", "starcoder2", "gpt_neox", "falcon", "phi", "opt", "gpt2"})


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model.

    Attributes:
        layers: transformer layers.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: rows of a head.
        gated: whether the MLP has a gate.
        experts: routed experts of a layer; 0: none.
        top_k: how many of them a token is sent to.
        model_type: transformers' word for the architecture; empty: not known.
        ranks: tensor-parallel ranks that a checkpoint was saved with.
        expert_ranks: those of experts.
        stages: pipeline ranks.
        name: of the model that it is the geometry of.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = True
    experts: int = 0
    top_k: int = 1
    model_type: str = ""
    ranks: int = 1
    expert_ranks: int = 1
    stages: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        of_model = (self.layers, self.heads, self.kv_heads, self.head_dim, self.top_k)
        sizes = (*of_model, self.ranks, self.expert_ranks, self.stages)
        if min(sizes) < 1 or self.experts < 0 or max(*sizes, self.experts) > _MOST or self.heads % self.kv_heads:
            raise ExportError(f"no model has these sizes: {self}"[:1000])

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    def interleaved(self) -> Tensor:
        """Return, for each row of Megatron's fused weight, its row in q, k and v one after the other.

        Megatron keeps, query group by query group, the group's query heads, its key head and its value head.
        """
        q, k, v = (torch.arange(rows) for rows in self.qkv)
        groups = [part.view(self.kv_heads, -1) for part in (q, q.numel() + k, q.numel() + k.numel() + v)]
        return torch.cat(groups, 1).flatten()


def geometry_of(model: Any) -> Geometry:
    """Return the sizes of a model.

    Args:
        model: its directory or ``config.json``, transformers' configuration, or the values of one. Megatron's words
            (``num_query_groups``, …) are understood too.

    Raises:
        ExportError: something is missing.
    """
    values = _values(model)
    with _says_sizes("the model's configuration"):
        name = str(values.get("_name_or_path") or (model if isinstance(model, str | os.PathLike) else ""))
        values = {**values, **(values.get("text_config") or {})}
        return _of_megatron(values) if "num_layers" in values and "num_query_groups" in values else _of_hf(values, name)


@contextmanager
def _says_sizes(where: str) -> Iterator[None]:
    """Turn whatever goes wrong with values that are none of sizes into one error."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, LoricaError):
            raise
        raise ExportError(f"{where} does not say its sizes: {type(error).__name__}: {error}"[:500]) from error


def known_geometry(model: Any, kept: Mapping[str, Any], config: Mapping[str, Any]) -> Geometry | None:
    """Return the sizes of an adapter's model: as given, as its files say, or of the base model that it names.

    Args:
        model: as in :func:`geometry_of`; None: not given.
        kept: what the adapter's files say.
        config: its configuration.

    Raises:
        ExportError: what is said is none of sizes.
    """
    with _says_sizes("what the adapter's files keep of its model"):
        said = kept.get("bridge", {}).get("model", {})
        said = said if said.get("num_layers") else kept.get("model", {})
        base = config.get("base_model_name_or_path")
        if model is not None:
            found = geometry_of(model)
        elif said.get("num_layers") and said.get("num_attention_heads"):
            return geometry_of(said)
        elif base and Path(base, "config.json").is_file():
            found = geometry_of(base)
        else:
            return None
        words = ("tensor_model", "expert_tensor", "pipeline_model")
        ranks, expert_ranks, stages = (int(said.get(f"{word}_parallel_size") or 1) for word in words)
        return replace(found, ranks=ranks, expert_ranks=expert_ranks, stages=stages)


def _values(model: Any) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    if isinstance(model, str | os.PathLike):
        path = Path(model).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ExportError(f"{path}: no configuration of a model; give its directory")
        return read_json_object(path)
    values = model.to_dict() if hasattr(model, "to_dict") else getattr(model, "__dict__", None)
    if not isinstance(values, Mapping):
        raise ExportError(f"{type(model).__name__} is no configuration of a model")
    return values


def _of_hf(values: Mapping[str, Any], name: str) -> Geometry:
    heads = int(values["num_attention_heads"])
    head_dim = values.get("head_dim") or int(values["hidden_size"]) // heads
    counts = (values.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    return Geometry(
        layers=int(values["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        gated=values.get("model_type") not in _WITHOUT_GATE,
        experts=int(next((count for count in counts if count), 0)),
        top_k=int(values.get("num_experts_per_tok") or 1),
        model_type=str(values.get("model_type") or ""),
        name=name,
    )


def _of_megatron(values: Mapping[str, Any]) -> Geometry:
    heads = int(values["num_attention_heads"])
    return Geometry(
        layers=int(values["num_layers"]),
        heads=heads,
        kv_heads=int(values["num_query_groups"] or heads),
        head_dim=int(values.get("kv_channels") or int(values["hidden_size"]) // heads),
        gated=bool(values.get("gated_linear_unit", False)),
        experts=int(values.get("num_moe_experts") or 0),
        top_k=int(values.get("moe_router_topk") or 1),
        ranks=int(values.get("tensor_model_parallel_size") or 1),
        expert_ranks=int(values.get("expert_tensor_parallel_size") or 1),
        stages=int(values.get("pipeline_model_parallel_size") or 1),
        name=str(values.get("hf_model_id") or ""),
    )


def as_megatron(geometry: Geometry) -> dict[str, Any]:
    """Return the sizes in Megatron's words, as ``run_config.yaml`` has them."""
    values: dict[str, Any] = {
        "num_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_query_groups": geometry.kv_heads,
        "kv_channels": geometry.head_dim,
        "gated_linear_unit": geometry.gated,
        "tensor_model_parallel_size": geometry.ranks,
        "expert_tensor_parallel_size": geometry.expert_ranks,
        "pipeline_model_parallel_size": geometry.stages,
    }
    if geometry.experts:
        values |= {"num_moe_experts": geometry.experts, "moe_router_topk": geometry.top_k}
    if geometry.name:
        values["hf_model_id"] = geometry.name
    return values


__all__ = ["Geometry", "as_megatron", "geometry_of", "known_geometry"]
