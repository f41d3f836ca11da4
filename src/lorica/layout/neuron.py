"""Reading what neuronx-distributed (through Optimum Neuron) writes about its shards, as weight specs.

Beside its shards lies a JSON object with ``parameters`` (of each: ``tensor_model_parallel``, ``partition_dim``,
``partition_stride``, ``num_partitions``) and ``model_weight_transformation_specs``: for each module a list of a
specification's name and its fields. Two names are known here; nothing is ever imported by a name from a file.

Its adapters have one A for all parts of a fused projection. Going back gives each part a copy, which is exact; going
there needs A's that are equal, since an average of several would be another adapter. Where projections are fused along
their inputs it is the other way round: one B, and an A of each.

The metadata name parameters as the adapted model does, with the adapter's name in them; shards have the names of files,
without it. Names are compared part by part, so an adapter may as well be called ``a`` or ``lora``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from lorica.errors import LayoutError
from lorica.layout.cuts import Cut, Dim, fused
from lorica.layout.heads import HeadOrder, grouped_heads
from lorica.layout.layout import Layout, Roles
from lorica.layout.specs import PREFIX, Spec, WeightSpecs

#: One specification of a module: its name and its fields.
Serialised = tuple[str, Mapping[str, Any]]

_FACTOR = re.compile(
    r"(?P<owner>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.(?P<adapter>[^.]+))??(?P<leaf>\.(?:weight|bias)\w*)?"
)
_COPY = re.compile(r"(?P<owner>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
_MAX_RANKS = 65536
#: Of all modules together.
_MAX_INTERVALS = 1_000_000
_QKV = ("q", "k", "v")
_ORDERS: tuple[Literal["strided"], Literal["neighbours"]] = ("strided", "neighbours")


def specs_from_neuron(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    *,
    axis: str = "tp",
    adapter: str | None = None,
    ranks: int | None = None,
) -> WeightSpecs:
    """Return the specs of one pipeline stage's tensors.

    Args:
        metadata: what the file holds.
        shapes: name → shape of the tensors that a rank has. Those of base layers may be left out, as they are from
            the shards of an adapter.
        axis: a name for the tensor-parallel axis.
        adapter: whose parameters are meant, where the metadata name those of several; None: of any.
        ranks: tensor-parallel ranks, for parameters of which the metadata do not say into how many they are cut.

    Raises:
        LayoutError: a field is missing or not what it should be, a specification is not known, or a tensor is of
            another shape than they say.
    """
    with_metadata = _Metadata(metadata, axis, adapter, ranks)
    there: dict[str, list[str]] = defaultdict(list)
    for local in shapes:
        there[_key(local)[0]].append(local)
    found = [_named(spec, local) for spec in with_metadata.candidates() for local in there.pop(spec.local, ())]
    left = [local for names in there.values() for local in names]
    found += [with_metadata.plain(local, shapes[local], here=True) for local in left]
    return WeightSpecs(tuple(_checked(spec, shapes[spec.local], axis) for spec in found))


def specs_to_neuron(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    *,
    axis: str = "tp",
    adapter: str | None = None,
    ranks: int | None = None,
) -> WeightSpecs:
    """Return the specs of the tensors that a pipeline stage is to have, of the logical tensors that there are.

    Args:
        metadata: what the file is to hold.
        shapes: name → shape of the logical tensors, named as in files.
        axis: a name for the tensor-parallel axis.
        adapter: as in :func:`specs_from_neuron`.
        ranks: likewise.

    Raises:
        LayoutError: a field is missing or not what it should be, or the metadata do not say how a tensor is to lie.
    """
    with_metadata = _Metadata(metadata, axis, adapter, ranks)
    found, left = [], dict(shapes)
    for spec in with_metadata.candidates():
        prefix = PREFIX if any(name.startswith(PREFIX) for name in spec.names) else ""
        names = (*spec.names, *spec.also)
        missing = [name for name in names if name not in left]
        if ".base_layer." in spec.local or len(missing) == len(names):
            continue
        if missing:
            raise LayoutError(
                f"{spec.local}: its projections are adapted together, and the logical state lacks {missing}"
            )
        for name in names:
            del left[name]
        found.append(_named(spec, f"{prefix}{spec.local}"))
    found += [with_metadata.plain(name, shape, here=False) for name, shape in left.items()]
    return WeightSpecs(tuple(found))


class _Metadata:
    """The metadata of one pipeline stage.

    Attributes:
        parameters: what is said of each parameter, by its name without the prefix and the name of the adapter.
    """

    def __init__(self, metadata: Mapping[str, Any], axis: str, adapter: str | None, ranks: int | None) -> None:
        self.axis, self.ranks = axis, ranks
        self._modules: Iterable[Any] = metadata.get("model_weight_transformation_specs", [])
        self.parameters: dict[str, Mapping[str, Any]] = {}
        try:
            for name, about in metadata["parameters"].items():
                key, owner = _key(str(name))
                if adapter is None or owner in (None, adapter):
                    self.parameters[key] = about
        except (KeyError, TypeError, AttributeError) as error:
            raise LayoutError(f"not the metadata of neuronx-distributed: {error!r}") from error

    def candidates(self) -> Iterator[Spec]:
        """Yield every tensor that a specification may mean, under its name without the prefix.

        Raises:
            LayoutError: a field is missing or not what it should be, or a specification is not known.
        """
        left = _MAX_INTERVALS
        try:
            for module in self._modules:
                name = str(module["module_fully_qualified_name"]).removeprefix(PREFIX.removesuffix("."))
                for kind, fields in module["specs"]:
                    left -= self._intervals(fields) if kind in _READERS else 0
                    if left < 0:
                        raise LayoutError(f"{name}: no model has more than {_MAX_INTERVALS:,} pieces on its ranks")
                    yield from spec_candidates(kind, fields, name.removeprefix("."), axis=self.axis)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, LayoutError):
                raise
            raise LayoutError(f"not the metadata of neuronx-distributed: {error!r}") from error

    def _intervals(self, fields: Mapping[str, Any]) -> int:
        """Return about how many pieces a specification means."""
        ranks = number(fields["tp_size"])
        if self.ranks is not None and ranks != self.ranks:
            raise LayoutError(f"tp_size={ranks} where there are {self.ranks} ranks")
        return ranks * len(fields.get("original_dims", ())) + int(fields.get("num_attention_heads", 0))

    def plain(self, name: str, shape: Sequence[int], *, here: bool) -> Spec:
        """Return how a tensor lies that no specification names: whole, or cut along one dimension, in strides or not.

        Args:
            name: of a rank's tensor, or of a logical one.
            shape: its shape.
            here: whether it is a rank's.

        Raises:
            LayoutError: the metadata do not say.
        """
        key, _ = _key(name)
        about = self.parameters.get(key, self.parameters.get(_in_base_layer(key)))
        if "lora_magnitude_vector" in name:
            raise LayoutError(
                f"{name}: Optimum Neuron's DoRA takes norms of shards, and no file says of which; train it anew"
            )
        if about is None:
            raise LayoutError(f"the metadata does not say how {name} lies")
        try:
            return self._plain(name, shape, about, here=here)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, LayoutError):
                raise
            raise LayoutError(f"not the metadata of neuronx-distributed: {name}: {error!r}") from error

    def _plain(self, name: str, shape: Sequence[int], about: Mapping[str, Any], *, here: bool) -> Spec:
        roles: Roles = (
            ("out", "in")[: len(shape)] if len(shape) < 3 else tuple(f"dim{dim}" for dim in range(len(shape)))
        )
        layout = Layout({})
        if about["tensor_model_parallel"]:
            dim, stride = int(about["partition_dim"]), int(about["partition_stride"])
            ranks = number(about.get("num_partitions", self.ranks))
            if self.ranks is not None and ranks != self.ranks:
                raise LayoutError(f"{name}: num_partitions={ranks} where there are {self.ranks} ranks")
            if len(shape) > 2 or not 0 <= dim < len(shape) or stride < 1 or 0 in shape:
                raise LayoutError(f"{name}: {tuple(shape)} cut along {dim} in strides of {stride} is not supported")
            role: Dim = "out" if dim == 0 else "in"
            length = shape[dim] * (ranks if here else 1)
            if length % (stride * ranks):
                raise LayoutError(f"{name}: {length} is not a multiple of {stride} strides on {ranks} ranks")
            cut = fused(self.axis, role, (length // stride,) * stride, ranks)
            layout = Layout({role: length}, (cut,))
        return Spec(name, ((_logical(name), 0),), roles, layout)


# ---- the specifications of modules -----------------------------------------------------------------------------------


def spec_candidates(kind: str, fields: Mapping[str, Any], module: str, *, axis: str = "tp") -> Iterator[Spec]:
    """Yield the tensors that one specification of a module may mean: of base layers and of factors.

    Args:
        kind: the specification's name.
        fields: what it says.
        module: full name of the module.
        axis: a name for the tensor-parallel axis.

    Raises:
        LayoutError: the specification is not known, or says what cannot be.
    """
    if kind not in _READERS:
        raise LayoutError(f"{module}: {kind!r} is not a known specification")
    yield from _READERS[kind](_Module(module, axis), fields)


def head_order(fields: Mapping[str, Any]) -> HeadOrder:
    """Return the heads of every rank that a ``GQAQKVColumnParallelLinearSpec`` means.

    Args:
        fields: of the specification; ``kv_order`` is lorica's own, ``"strided"`` where it is missing.

    Raises:
        LayoutError: the heads cannot be divided so.
    """
    names = ("tp_size", "num_attention_heads", "num_key_value_heads", "kv_size_multiplier")
    ranks, heads, kv_heads, multiplier = (number(fields[name]) for name in names)
    order = fields.get("kv_order", _ORDERS[0])
    if order not in _ORDERS:
        raise LayoutError(f"kv_order={order!r} is none of {_ORDERS}")
    return grouped_heads(ranks, heads, kv_heads, multiplier=multiplier, order=order)


class _Module:
    """Makes the specs of one module's tensors."""

    def __init__(self, name: str, axis: str) -> None:
        self.name, self.axis = name, axis

    def child(self, name: str) -> str:
        """Return the full name of a module inside."""
        return f"{self.name}.{name}" if self.name else name

    def rows(self, owner: str, parts: Mapping[str, int], cut: Cut, suffix: str = "") -> Iterator[Spec]:
        """Yield weight, bias and B of a module whose rows are those of ``parts``, in turn, and are cut."""
        total = sum(parts.values())
        layout = Layout({"out": total}, (cut,), tuple(parts.items()) if len(parts) > 1 else ())
        for leaf in ("weight", "bias"):
            roles: Roles = ("out", "in") if leaf == "weight" else ("out",)
            named = tuple((f"{name}.{leaf}", length) for name, length in parts.items())
            yield Spec(f"{owner}.{leaf}{suffix}", named, roles, layout)
            yield Spec(f"{owner}.base_layer.{leaf}{suffix}", named, roles, layout)
        for leaf in ("weight", "bias"):
            roles = ("out", "rank") if leaf == "weight" else ("out",)
            named = tuple((f"{PREFIX}{name}.lora_B.{leaf}", length) for name, length in parts.items())
            yield Spec(f"{owner}.lora_B.{leaf}{suffix}", named, roles, layout)
            if suffix and len(parts) > 1:
                yield Spec(f"{owner}.lora_B.{leaf}", named, roles, layout)

    def columns(self, owner: str, parts: Mapping[str, int], cut: Cut) -> Iterator[Spec]:
        """Yield weight and A of a module whose inputs are those of ``parts``, in turn, and are cut."""
        layout = Layout({"in": sum(parts.values())}, (cut,))
        named = tuple((f"{name}.weight", length) for name, length in parts.items())
        yield Spec(f"{owner}.weight", named, ("out", "in"), layout, along="in")
        yield Spec(f"{owner}.base_layer.weight", named, ("out", "in"), layout, along="in")
        named = tuple((f"{PREFIX}{name}.lora_A.weight", length) for name, length in parts.items())
        yield Spec(f"{owner}.lora_A.weight", named, ("rank", "in"), layout, along="in")

    def shared(self, owner: str, parts: Iterable[str], letter: str) -> Iterator[Spec]:
        """Yield the one A (or B) of a module that is several projections."""
        names = [f"{PREFIX}{name}.lora_{letter}.weight" for name in parts]
        roles = ("rank", "in") if letter == "A" else ("out", "rank")
        yield Spec(f"{owner}.lora_{letter}.weight", ((names[0], 0),), roles, Layout({}), also=tuple(names[1:]))


def _fused_linears(module: _Module, fields: Mapping[str, Any]) -> Iterator[Spec]:
    dims, ranks = [int(dim) for dim in fields["original_dims"]], number(fields["tp_size"])
    parts = {module.child(name): dim for name, dim in zip(fields["linear_names"], dims, strict=True)}
    if any(dim % ranks for dim in dims):
        raise LayoutError(f"{module.name}: {dims} rows do not divide over {ranks} ranks")
    owner = module.child(fields["fused_linear_name"])
    if fields["fuse_axis"] in (0, "column"):
        yield from module.rows(owner, parts, fused(module.axis, "out", tuple(dims), ranks))
        yield from module.shared(owner, parts, "A")
    elif fields["fuse_axis"] in (1, "row"):
        yield from module.columns(owner, parts, fused(module.axis, "in", tuple(dims), ranks))
        yield from module.shared(owner, parts, "B")
    else:
        raise LayoutError(f"{module.name}: projections fused along {fields['fuse_axis']!r} are not supported")


def _grouped_queries(module: _Module, fields: Mapping[str, Any]) -> Iterator[Spec]:
    order, heads, kv_heads = head_order(fields), fields["num_attention_heads"], fields["num_key_value_heads"]
    rows = int(fields["q_output_size_per_partition"]) * int(fields["tp_size"])
    head_dim, rest = divmod(rows, heads)
    if rest or int(fields["kv_output_size_per_partition"]) != head_dim * len(order.kv[0]):
        raise LayoutError(
            f"{module.name}: {rows} query rows are not {heads} heads, or key/value rows are no such heads"
        )
    names = [module.child(fields[f"{part}_projection_name"]) for part in ("query", "key", "value")]
    lengths = [rows, *2 * [kv_heads * head_dim]]
    owner = module.child(fields["gqa_qkv_projection_name"])
    if fields["fuse_qkv"]:
        yield from module.rows(
            owner, dict(zip(names, lengths, strict=True)), order.qkv_cut(module.axis, head_dim), "_qkv"
        )
    else:
        kv = order.kv_cut(module.axis, head_dim)
        cuts = (order.query_cut(module.axis, head_dim), kv, kv)
        for letter, name, length, cut in zip(_QKV, names, lengths, cuts, strict=True):
            yield from module.rows(owner, {name: length}, cut, f"_{letter}")
    yield from module.shared(owner, names, "A")
    output = module.child(fields["output_projection_name"])
    yield from module.columns(output, {output: rows}, order.query_cut(module.axis, head_dim, dim="in"))


_READERS: dict[str, Callable[[_Module, Mapping[str, Any]], Iterator[Spec]]] = {
    "FusedLinearsSpec": _fused_linears,
    "GQAQKVColumnParallelLinearSpec": _grouped_queries,
}
#: Names of the specifications that are known.
SPECIFICATIONS = frozenset(_READERS)


# ---- names and numbers -----------------------------------------------------------------------------------------------


def number(value: Any) -> int:
    """Return a count that a file gives, if it is one that a machine can have.

    Raises:
        LayoutError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_RANKS:
        raise LayoutError(f"{value!r} is not a number from 1 to {_MAX_RANKS}")
    return value


def key_of(name: str) -> str:
    """Return a parameter's name without PEFT's prefix and without the name of the adapter."""
    return _key(name)[0]


def _key(name: str) -> tuple[str, str | None]:
    """Return a parameter's name without the prefix and the name of the adapter, and the latter."""
    bare = name.removeprefix(PREFIX)
    if (factor := _FACTOR.fullmatch(bare)) is not None:
        return f"{factor['owner']}.{factor['kind']}{factor['leaf'] or ''}", factor["adapter"]
    if (copy := _COPY.fullmatch(bare)) is not None:
        return f"{copy['owner']}.{copy['leaf']}", copy["adapter"]
    return bare, None


def _in_base_layer(key: str) -> str:
    owner, _, leaf = key.rpartition(".")
    return f"{owner}.base_layer.{leaf}"


def _logical(name: str) -> str:
    """Return the name in a file: without ``base_layer`` and without the adapter's name."""
    key, _ = _key(name)
    if _FACTOR.fullmatch(key) is not None:
        return f"{PREFIX}{key}"
    return (PREFIX if name.startswith(PREFIX) else "") + key.replace(".base_layer.", ".")


def _named(spec: Spec, local: str) -> Spec:
    """Return a spec under the name that its tensor has; base weights keep the prefix that it has."""
    prefix = PREFIX if local.startswith(PREFIX) else ""
    parts = tuple((name if name.startswith(PREFIX) else f"{prefix}{name}", length) for name, length in spec.parts)
    return Spec(local, parts, spec.roles, spec.layout, spec.along, spec.also, spec.absent)


def _checked(spec: Spec, shape: Sequence[int], axis: str) -> Spec:
    sizes: Mapping[str, int] = spec.layout.sizes
    if len(shape) == len(spec.roles):
        whole = [sizes.get(role, length) for role, length in zip(spec.roles, shape, strict=True)]
        if tuple(shape) == tuple(spec.layout.local_shape(spec.roles, whole, {axis: 0})):
            return spec
    raise LayoutError(f"{spec.local} has the shape {tuple(shape)}, which is not what the metadata says")


__all__ = [
    "SPECIFICATIONS",
    "head_order",
    "key_of",
    "number",
    "spec_candidates",
    "specs_from_neuron",
    "specs_to_neuron",
]
