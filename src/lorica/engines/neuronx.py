"""neuronx-distributed's layers as layouts, known by the names of their classes. Not run on the real package.

Its XLA stack has reached its end of support; what is said here is what its source says (``parallel_layers/layers.py``,
``modules/qkv_linear.py``, ``parallel_layers/grads.py``). Which heads a rank has is not known to the layers: it is in
the weight transformation specifications of the module around them (``module.specs``, Optimum Neuron's), which are read.

::

    column:  input ─ gather the sequence | copy ─ product ─ (gather)       row:  input ─ product ─ reduce (scatter)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engines.inside import Inside, InsideOpening
from lorica.engines.placed import Kinds, Placed, describe_anew, describe_whole, described_once
from lorica.engines.site import Axis, Site
from lorica.errors import LayoutError
from lorica.layout import Layout, Roles, even
from lorica.layout.neuron import SPECIFICATIONS, spec_candidates

_PACKAGE = "neuronx_distributed"
_LAYERS = f"{_PACKAGE}.parallel_layers.layers."
COLUMN, ROW, EMBEDDING = (
    f"{_LAYERS}{name}" for name in ("ColumnParallelLinear", "RowParallelLinear", "ParallelEmbedding")
)
QKV = f"{_PACKAGE}.modules.qkv_linear.GQAQKVColumnParallelLinear"
#: Name of the one weight of a fused query, key and value layer.
QKV_WEIGHT = "weight_qkv"
#: Where such a layer is adapted: only there its parts are known.
QKV_NEEDS = (
    "it has one weight (fuse_qkv=True) and is in a module whose specs have a GQAQKVColumnParallelLinearSpec, which "
    "says the heads of a rank"
)
TENSOR, DATA, STAGES = "tp", "dp", "pp"
#: Where a layer keeps what the specifications around it say of its weight.
_TOLD = "lorica_told"


# ---- the way in ------------------------------------------------------------------------------------------------------


def _mappings() -> Any:
    from neuronx_distributed.parallel_layers import mappings

    return mappings


def _entered(x: Tensor, group: Any, *, allreduce: bool, sequence_parallel: bool, dim: int | None) -> Tensor:
    """Return the input that is multiplied: with all tokens, or as it is where its gradient is to be summed."""
    if sequence_parallel:
        gathered: Tensor = _mappings().gather_from_sequence_parallel_region(
            x, sequence_dimension=dim or 0, to_model_parallel=True, process_group=group
        )
        return gathered
    if allreduce:
        copied: Tensor = _mappings().copy_to_tensor_model_parallel_region(x, process_group=group)
        return copied
    return x


class _Linear(Inside):
    """In the place of ``_forward_impl`` of a linear layer."""

    method = "_forward_impl"

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        async_grad_allreduce: bool = False,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = 0,
        process_group: Any = None,
        **options: Any,
    ) -> Any:
        x = _entered(
            input,
            process_group,
            allreduce=async_grad_allreduce,
            sequence_parallel=sequence_parallel_enabled,
            dim=sequence_dimension,
        )
        return self.product(x)

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        return F.linear(x, self.module.weight)  # the bias is added after the collective of the output


class _QKV(Inside):
    """In the place of ``_forward_impl`` of a fused query, key and value layer: ``product`` gives the three in one.

    Each copy of a key/value head has the gradient of its own queries; the sum over all ranks counts each once.
    """

    method = "_forward_impl"

    def __call__(self, input: Tensor, **options: Any) -> tuple[Tensor, ...]:
        x = _entered(
            input,
            options.get("process_group"),
            allreduce=options.get("async_grad_allreduce", False),
            sequence_parallel=options.get("sequence_parallel_enabled", False),
            dim=options.get("sequence_dimension"),
        )
        module = self.module
        rows = [module.q_output_size_per_partition, *2 * [module.kv_output_size_per_partition]]
        return torch.split(self.product(x), rows, dim=-1)

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        return F.linear(x, self.module.weight_qkv)


class _Embedding(Inside):
    """In the place of ``forward`` of an embedding: ``product`` gets ids of the whole vocabulary."""

    method = "forward"

    def __call__(self, input_: Tensor) -> Tensor:
        module, rows, mappings = self.module, self.product(input_), _mappings()
        group = _group_of(module)
        if module.shard_across_embedding:
            whole: Tensor = mappings.gather_from_tensor_model_parallel_region(rows, process_group=group)
            return whole
        if getattr(module, "sequence_parallel_enabled", False):  # [batch, tokens, …] → [this rank's tokens, batch, …]
            scattered: Tensor = mappings.reduce_scatter_to_sequence_parallel_region(
                rows.transpose(0, 1).contiguous(), process_group=group
            )
            return scattered
        reduced: Tensor = mappings.reduce_from_tensor_model_parallel_region(rows, process_group=group)
        return reduced

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        module = self.module
        if module.shard_across_embedding:
            return F.embedding(x, module.weight)
        elsewhere = (x < module.start_index) | (x >= module.end_index)
        rows = F.embedding((x - module.start_index).masked_fill(elsewhere, 0), module.weight, module.padding_idx)
        return rows.masked_fill(elsewhere.unsqueeze(-1), 0)


# ---- where things lie ------------------------------------------------------------------------------------------------


class NeuronxPlaced(Placed):
    """How one of its layers lies."""

    @property
    def splits_tokens(self) -> bool:
        """Whether what enters or leaves the layer is this rank's tokens."""
        return bool(getattr(self.module, "sequence_parallel_enabled", False))

    def place(self, axes: Mapping[str, Axis], data: tuple[str, ...]) -> Site:
        """Return where the layer is adapted.

        Raises:
            LayoutError: the layer cannot be adapted as it was made.
        """
        if getattr(self.module, "pad", False) and getattr(self.module, "pad_size", 0):
            raise LayoutError("a padded layer (pad=True) is for inference only, and cannot be adapted")
        return Site(self.layout, {**axes, **self.axes}, InsideOpening(self.module, _INSIDE[self.kind]), bias=0.0)


_INSIDE: dict[str, type[Inside]] = {COLUMN: _Linear, ROW: _Linear, EMBEDDING: _Embedding, QKV: _QKV}
_KINDS = Kinds(_INSIDE)


class NeuronxEngine:
    """neuronx-distributed, for the registry."""

    def knows(self, cls: type[nn.Module]) -> bool:
        """Whether a class is one of its layers, or derived from one."""
        return _KINDS.of(cls) is not None

    def describe(self, module: nn.Module) -> NeuronxPlaced:
        """Return how a layer lies; worked out once."""
        return described_once(module, _described)

    def uncut(self, module: nn.Module) -> None:
        """Describe a copy as whole."""
        describe_whole(module, self.describe(module))

    def prepare(self, model: nn.Module) -> None:
        """Tell layers what the specifications of the modules around them say."""
        if _PACKAGE in sys.modules:
            for module in model.modules():
                _tell(module)

    def adapted(self, model: nn.Module, finish: Callable[[nn.Module], None]) -> None:
        """Nothing: its optimiser has no place for that; see :meth:`mark`."""

    def mark(self, module: nn.Module, site: Site, parameter: nn.Parameter, roles: Roles) -> None:
        """Give a factor the attributes that its optimiser and its checkpoints read.

        With sequence parallelism its optimiser sums the gradients of parameters marked ``sequence_parallel_enabled``
        over tensor-parallel ranks: those of which each has a share. What Optimum Neuron's adapters lack is this mark.
        """
        marked: Any = parameter
        dims = [dim for dim, role in enumerate(roles) if site.layout.cut_of(role) is not None]
        marked.tensor_model_parallel = bool(dims)
        marked.partition_dim = dims[0] if dims else -1
        marked.partition_stride, marked.num_partitions = 1, site.axes[TENSOR].size if dims else 1
        partial = TENSOR in site.layout.summed(roles) and not dims
        marked.sequence_parallel_enabled = partial and self.describe(module).splits_tokens

    def reduces(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Return the axes over which its optimiser reduces a gradient, where its trainer is loaded."""
        if f"{_PACKAGE}.trainer" not in sys.modules or not hasattr(parameter, "num_partitions"):
            return ()
        return (DATA, TENSOR) if getattr(parameter, "sequence_parallel_enabled", False) else (DATA,)

    def axes(self, model: nn.Module) -> Mapping[str, Axis]:
        """Return none but those of the layers."""
        return {}

    def stages(self, model: nn.Module) -> Axis | None:
        """Return the axis of pipeline stages, of a model with such layers."""
        if _PACKAGE not in sys.modules or not any(map(self.knows, {type(module) for module in model.modules()})):
            return None
        return Axis.of_group(STAGES, _state("get_pipeline_model_parallel_group"))

    def lies_elsewhere(self, model: nn.Module, name: str) -> bool:
        """Whether a name is of another stage: not known, so no."""
        return False

    def checkpoints(self) -> None:
        """None that ask modules."""


def _tell(module: nn.Module) -> None:
    """Read the specifications of a module, and leave at its layers how their weights lie."""
    specs: Any = getattr(module, "specs", None)
    for spec in specs if hasattr(specs, "__iter__") else ():
        if type(spec).__name__ in SPECIFICATIONS and dataclasses.is_dataclass(spec) and not isinstance(spec, type):
            for found in spec_candidates(type(spec).__name__, dataclasses.asdict(spec), "", axis=TENSOR):
                owner, _, leaf = found.local.rpartition(".")
                if leaf in ("weight", QKV_WEIGHT) and "." not in owner and owner in module._modules:
                    layer = module.get_submodule(owner)
                    layer.__dict__[_TOLD] = found.layout
                    describe_anew(layer)


def _described(module: Any) -> NeuronxPlaced:
    kind = _KINDS.of(type(module))
    assert kind is not None
    axis = Axis.of_group(TENSOR, _group_of(module))
    data = Axis.of_group(DATA, _state("get_data_parallel_group"))
    layout = _layout(module, kind, axis)
    if (told := module.__dict__.get(_TOLD)) is not None:
        sizes: Mapping[str, int] = layout.sizes
        if any(sizes[role] != length for role, length in told.sizes.items()):
            raise LayoutError(
                f"a {type(module).__name__} of {dict(sizes)} is not what its specification says: {told.sizes}"
            )
        layout = replace(layout, cuts=told.cuts, parts=told.parts)
    return NeuronxPlaced(module, kind, replace(layout, data=(DATA,)), {axis.name: axis, data.name: data})


def _layout(module: Any, kind: str, axis: Axis) -> Layout:
    if kind == QKV:
        query, kv = module.output_sizes
        return Layout({"out": query + 2 * kv, "in": module.input_size})  # how it is cut the specification says
    if kind == EMBEDDING:
        sizes = {"in": module.num_embeddings, "out": module.embedding_dim}
        role: Any = "out" if module.shard_across_embedding else "in"
    else:
        sizes = {"out": module.output_size, "in": module.input_size}
        role = "in" if kind == ROW else "out"
        if getattr(module, "stride", 1) != 1 and _TOLD not in module.__dict__:
            raise LayoutError(f"cut in {module.stride} strides, and no specification says of what")
    return Layout(sizes, (even(axis.name, role, sizes[role], axis.size),))


def _group_of(module: Any) -> Any:
    for name in ("tensor_parallel_group", "tensor_model_parallel_group"):
        if (group := getattr(module, name, None)) is not None:
            return group
    return _state("get_tensor_model_parallel_group")


def _state(getter: str) -> Any:
    """Return a group of neuronx-distributed's global state; None where it has none."""
    state: Any = sys.modules.get(f"{_PACKAGE}.parallel_layers.parallel_state")
    return None if state is None or not state.model_parallel_is_initialized() else getattr(state, getter)()


__all__ = ["COLUMN", "EMBEDDING", "QKV", "QKV_NEEDS", "QKV_WEIGHT", "ROW", "NeuronxEngine", "NeuronxPlaced"]
