"""Reading what neuronx-distributed (through Optimum Neuron) writes about its shards, as weight specs.

Beside its shards lies a JSON object with ``parameters`` (of each: ``tensor_model_parallel``, ``partition_dim``,
``partition_stride``, ``num_partitions``) and ``model_weight_transformation_specs``: for each module a list of a
specification's name and its fields. Two names are known here; nothing is ever imported by a name from a file.

Its adapters have one A for all parts of a fused projection. Going back gives each part a copy, which is exact; going
there needs A's that are equal, since an average of several would be another adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorica.errors import LayoutError
from lorica.layout.cuts import Cut, Dim, fused
from lorica.layout.heads import grouped_heads
from lorica.layout.layout import Layout, Roles
from lorica.layout.specs import PREFIX, Spec, WeightSpecs

_FACTOR = re.compile(r"(?P<owner>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.(?P<adapter>\w+))??(?P<leaf>\.weight\w*)?")
_MAX_RANKS = 65536
_QKV = ("q", "k", "v")


def specs_from_neuron(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], *, axis: str = "tp"
) -> WeightSpecs:
    """Return the specs of one pipeline stage's tensors.

    Args:
        metadata: what the file holds.
        shapes: name → shape of the tensors that a rank has. Those of base layers may be left out, as they are from
            the shards of an adapter.
        axis: a name for the tensor-parallel axis.

    Raises:
        LayoutError: a field is missing or not what it should be, a specification is not known, or a tensor is of
            another shape than they say.
    """
    reader = _Reader(shapes, axis)
    try:
        for module in metadata.get("model_weight_transformation_specs", []):
            for kind, fields in module["specs"]:
                if kind not in _READERS:
                    raise LayoutError(f"{module['module_fully_qualified_name']}: {kind!r} is not a known specification")
                _READERS[kind](reader, str(module["module_fully_qualified_name"]), fields)
        for name, about in metadata["parameters"].items():
            if name in reader.left:
                reader.plain(name, about)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(f"not the metadata of neuronx-distributed: {error!r}") from error
    if reader.left:
        raise LayoutError(f"the metadata does not say how {sorted(reader.left)[:5]} lie")
    return WeightSpecs(tuple(reader.specs))


@dataclass
class _Reader:
    """Collects specs; ``left`` are the tensors that have none yet."""

    shapes: Mapping[str, Sequence[int]]
    axis: str
    specs: list[Spec] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = set(self.shapes)

    def add(self, spec: Spec) -> None:
        self.left.discard(spec.local)
        shape = tuple(self.shapes[spec.local])
        sizes: Mapping[str, int] = spec.layout.sizes
        whole = [sizes.get(role, length) for role, length in zip(spec.roles, shape, strict=True)]
        if shape != tuple(spec.layout.local_shape(spec.roles, whole, {self.axis: 0})):
            raise LayoutError(f"{spec.local} has the shape {shape}, which is not what the metadata says")
        self.specs.append(spec)

    def found(self, owner: str, leaf: str, kind: str = "") -> Iterator[str]:
        """Yield the tensors ``leaf`` of a module that there are: of the base layer, or factors of any adapter."""
        for name in sorted(self.left):
            factor = _FACTOR.fullmatch(name)
            if kind and factor is not None and (factor["owner"], factor["kind"]) == (owner, kind):
                if (factor["leaf"] or "").removeprefix(".") == leaf:
                    yield name
            elif not kind and name in (f"{owner}.{leaf}", f"{owner}.base_layer.{leaf}"):
                yield name

    def rows(self, owner: str, parts: Mapping[str, int], cut: Cut, suffix: str = "") -> None:
        """Add weight, bias, A and B of a module whose rows are those of ``parts``, in turn, and are cut."""
        total = sum(parts.values())
        layout = Layout({"out": total}, (cut,), tuple(parts.items()) if len(parts) > 1 else ())
        for leaf in ("weight", "bias"):
            for local in self.found(owner, f"{leaf}{suffix}"):
                named = tuple((f"{name}.{leaf}", length) for name, length in parts.items())
                roles: Roles = ("out", "in") if leaf == "weight" else ("out",)
                self.add(Spec(local, named, roles, layout))
        leaves = {f"weight{suffix}", "weight"} if len(parts) > 1 else {f"weight{suffix}"}
        for local in [name for leaf in sorted(leaves) for name in self.found(owner, leaf, "lora_B")]:
            named = tuple((f"{PREFIX}{name}.lora_B.weight", length) for name, length in parts.items())
            self.add(Spec(local, named, ("out", "rank"), layout))

    def shared_a(self, owner: str, parts: Sequence[str]) -> None:
        """Add the one A of a module that is several projections."""
        for local in self.found(owner, "weight", "lora_A"):
            names = [f"{PREFIX}{name}.lora_A.weight" for name in parts]
            self.add(Spec(local, ((names[0], 0),), ("rank", "in"), Layout({}), also=tuple(names[1:])))

    def columns(self, owner: str, cut: Cut) -> None:
        """Add weight and A of a module whose inputs are cut."""
        layout = Layout({"in": cut.total}, (cut,))
        for local in self.found(owner, "weight"):
            self.add(Spec(local, ((f"{owner}.weight", 0),), ("out", "in"), layout))
        for local in self.found(owner, "weight", "lora_A"):
            self.add(Spec(local, ((f"{PREFIX}{owner}.lora_A.weight", 0),), ("rank", "in"), layout))

    def plain(self, name: str, about: Mapping[str, Any]) -> None:
        """Add a tensor that no specification names: whole, or cut along one dimension, in strides or without."""
        shape = self.shapes[name]
        roles: Roles = (
            ("out", "in")[: len(shape)] if len(shape) < 3 else tuple(f"dim{dim}" for dim in range(len(shape)))
        )
        layout = Layout({})
        if about["tensor_model_parallel"]:
            dim, stride = int(about["partition_dim"]), int(about["partition_stride"])
            ranks = _number(about["num_partitions"])
            if len(shape) > 2 or not 0 <= dim < len(shape) or stride < 1:
                raise LayoutError(f"{name}: {tuple(shape)} cut along {dim} in strides of {stride} is not supported")
            role: Dim = "out" if dim == 0 else "in"
            length = shape[dim] * ranks
            if length % (stride * ranks):
                raise LayoutError(f"{name}: {length} is not a multiple of {stride} strides on {ranks} ranks")
            cut = fused(self.axis, role, (length // stride,) * stride, ranks)
            layout = Layout({role: length}, (cut,))
        self.add(Spec(name, ((_logical(name), 0),), roles, layout))


def _fused_linears(reader: _Reader, module: str, fields: Mapping[str, Any]) -> None:
    if fields["fuse_axis"] not in (0, "column"):
        raise LayoutError(f"{module}: projections fused along {fields['fuse_axis']!r} are not supported")
    dims, ranks = [int(dim) for dim in fields["original_dims"]], _number(fields["tp_size"])
    parts = {f"{module}.{name}": dim for name, dim in zip(fields["linear_names"], dims, strict=True)}
    if any(dim % ranks for dim in dims):
        raise LayoutError(f"{module}: {dims} rows do not divide over {ranks} ranks")
    owner = f"{module}.{fields['fused_linear_name']}"
    reader.rows(owner, parts, fused(reader.axis, "out", tuple(dims), ranks))
    reader.shared_a(owner, [*parts])


def _grouped_queries(reader: _Reader, module: str, fields: Mapping[str, Any]) -> None:
    ranks, heads, kv_heads = (
        _number(fields[name]) for name in ("tp_size", "num_attention_heads", "num_key_value_heads")
    )
    order = grouped_heads(ranks, heads, kv_heads, multiplier=_number(fields["kv_size_multiplier"]))
    rows = int(fields["q_output_size_per_partition"]) * ranks
    head_dim, rest = divmod(rows, heads)
    if rest or int(fields["kv_output_size_per_partition"]) != head_dim * len(order.kv[0]):
        raise LayoutError(f"{module}: {rows} query rows are not {heads} heads, or key/value rows are no such heads")
    named = (fields[f"{part}_projection_name"] for part in ("query", "key", "value"))
    names = [f"{module}.{name}" for name in named]
    lengths = [rows, *2 * [kv_heads * head_dim]]
    owner = f"{module}.{fields['gqa_qkv_projection_name']}"
    if fields["fuse_qkv"]:
        cut = order.qkv_cut(reader.axis, head_dim)
        reader.rows(owner, dict(zip(names, lengths, strict=True)), cut, "_qkv")
    else:
        kv = order.kv_cut(reader.axis, head_dim)
        cuts = (order.query_cut(reader.axis, head_dim), kv, kv)
        for letter, name, length, cut in zip(_QKV, names, lengths, cuts, strict=True):
            reader.rows(owner, {name: length}, cut, f"_{letter}")
    reader.shared_a(owner, names)
    reader.columns(f"{module}.{fields['output_projection_name']}", order.query_cut(reader.axis, head_dim, dim="in"))


_READERS: dict[str, Callable[[_Reader, str, Mapping[str, Any]], None]] = {
    "FusedLinearsSpec": _fused_linears,
    "GQAQKVColumnParallelLinearSpec": _grouped_queries,
}


def _number(value: Any) -> int:
    """Return a count that a file gives, if it is one that a machine can have."""
    if not isinstance(value, int) or not 1 <= value <= _MAX_RANKS:
        raise LayoutError(f"{value!r} is not a number from 1 to {_MAX_RANKS}")
    return value


def _logical(name: str) -> str:
    """Return the name in a file: without ``base_layer`` and without the adapter's name."""
    factor = _FACTOR.fullmatch(name)
    if factor is None:
        return name.replace(".base_layer.", ".")
    return f"{PREFIX}{factor['owner']}.{factor['kind']}{factor['leaf'] or ''}"


__all__ = ["specs_from_neuron"]
