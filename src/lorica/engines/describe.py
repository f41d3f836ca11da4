"""What the engines say of a model: where each of its layers lies among the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorica.engines import fsdp
from lorica.engines.dtensor import cuts_of
from lorica.engines.kinds import is_distributed, is_fully_sharded
from lorica.engines.megatron.engine import MegatronEngine
from lorica.engines.native.base import NativeEngine
from lorica.engines.neuronx import NeuronxEngine
from lorica.engines.registry import ENGINES, Description, described
from lorica.engines.site import Axis, Site, opening_of
from lorica.engines.stages import STAGES, axis_of_stages
from lorica.errors import LayoutError
from lorica.layout import Cut, Layout, Roles

#: Names of mesh axes over which batches are divided, on models that :func:`lorica.parallel.parallelize` cut.
DATA_AXES = ("dp", "dp_replicate", "fsdp", "dp_shard")
#: transformers lays the same ranks out twice, once for its dense layers and once for its experts. A layer knows the
#: axes of its own view; those of the other one would divide it by the same ranks again.
DENSE_VIEW, EXPERT_VIEW = frozenset({"fsdp", "tp"}), frozenset({"efsdp", "ep", "etp", "edp"})

ENGINES.extend([NativeEngine(), MegatronEngine(), NeuronxEngine()])


class Engines:
    """Describes the layers of one model.

    Args:
        model: the base model, adapted or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.axes: dict[str, Axis] = {}
        self._data: tuple[str, ...] = ()
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        fsdp.reshard(model)
        self._storage = fsdp.data_axes(model)
        inner = _innermost(model)
        stages = axis_of_stages(inner)
        found = {name: axis for engine in ENGINES for name, axis in engine.axes(inner).items()}
        found = {**found, **_axes_of_layers(model), **self._storage, **_axes_of_weights(model)}
        found |= {} if stages is None else {STAGES: stages}
        self.axes = {name: axis for name, axis in found.items() if axis.size > 1}
        data = {*self._storage, *DATA_AXES}
        self._data = tuple(name for name in self.axes if name in data)

    def site(self, name: str, module: nn.Module, weight: Any, roles: Roles) -> Site | None:
        """Return where a base layer lies, or None where nothing is divided.

        Args:
            name: its full name, for messages.
            module: the base layer.
            weight: the parameter that is adapted, or what has its shape.
            roles: the role of each dimension of that parameter.

        Raises:
            LayoutError: it is cut in a way that cannot be described.
        """
        if (found := described(module)) is not None:
            try:
                return found.place(self.axes, self._data)
            except LayoutError as error:
                raise LayoutError(f"{name}: {error}") from None
        if not self.axes:
            return None
        layout, axes = self._layout(weight, roles, module, name), self._axes_of(weight)
        # A layer that is a fully-sharded unit by itself has its bias whole inside its forward only.
        wrapped = layout.cuts or getattr(module, "_is_hooked", False) or is_fully_sharded(module)
        # A product of distributed tensors adds this rank's equal share of the bias to its partial sum.
        return Site(layout, axes, opening_of(module) if wrapped else None, bias=1 / layout.shares())

    def parameter_site(self, name: str, module: nn.Module, parameter: str, roles: Roles) -> Site | None:
        """Return where one parameter of a module lies, for a module that trains or is saved as a whole.

        Args:
            name: the module's full name, for messages.
            module: it.
            parameter: name of one of its parameters.
            roles: the role of each dimension; any other word where a dimension has none.

        Raises:
            LayoutError: it is cut in a way that cannot be described.
        """
        if (found := described(module)) is not None:
            return _beside(found, found.place(self.axes, self._data), roles)
        if not self.axes:
            return None
        weight = getattr(module, parameter)
        return Site(self._layout(weight, roles, module, name), self._axes_of(weight))

    def _layout(self, weight: Tensor, roles: Roles, module: nn.Module, name: str) -> Layout:
        # By name too: the module that fully_shard was applied to may stand around the one that is described.
        storage = {*self._storage, *DATA_AXES}
        cuts = cuts_of(weight, roles, storage, name) if is_distributed(weight) else ()
        data = tuple(axis for axis in self._data if axis in self._axes_of(weight))
        batches = self._batches(cuts)
        sequence = _sequence(module, weight)
        return Layout(_sizes(weight, roles), cuts, sequence=sequence, data=data, batches=batches)

    def _axes_of(self, weight: Tensor) -> dict[str, Axis]:
        """Return the axes of the view that a weight belongs to."""
        own = set(weight.device_mesh.mesh_dim_names or ()) if is_distributed(weight) else set()
        other = (DENSE_VIEW if own & EXPERT_VIEW else EXPERT_VIEW) - own
        return {name: axis for name, axis in self.axes.items() if name not in other}

    def _batches(self, cuts: Iterable[Cut]) -> int:
        """Return how many batches the ranks bring together that experts lie over: those of a tensor-parallel group,
        which is within theirs, share one.
        """
        experts = next((cut.size for cut in cuts if cut.dim == "expert" and cut.axis in EXPERT_VIEW), 1)
        tensor_parallel = self.axes["tp"].size if "tp" in self.axes else 1
        return max(1, experts // tensor_parallel)


def _sizes(weight: Tensor, roles: Roles) -> dict[str, int]:
    named = zip(roles, weight.shape, strict=True)
    return {role: length for role, length in named if role in ("out", "in", "expert")}


def _beside(found: Description, site: Site, roles: Roles) -> Site:
    """Return where a parameter with these roles lies, of a layer that lies at ``site``."""
    layout = site.layout
    cuts = tuple(cut for cut in layout.cuts if cut.dim in roles)  # what it lacks is added after the reduction
    after = tuple(cut.axis for cut in layout.cuts if cut.dim not in roles and found.splits_tokens)
    sizes = {role: layout.sizes[role] for role in roles if role in layout.sizes}
    parts, groups = (layout.parts, layout.groups) if "out" in roles else ((), ())
    return Site(Layout(sizes, cuts, parts, (*layout.sequence, *after), layout.data, groups=groups), site.axes)


def _sequence(module: nn.Module, weight: Tensor) -> tuple[str, ...]:
    """Return the axes whose ranks see different tokens in a whole layer; Megatron marks its weights."""
    marked = ("tp",) if getattr(weight, "sequence_parallel", False) else ()
    return (*getattr(module, "sequence_axes", ()), *marked)


def _axes_of_layers(model: nn.Module) -> dict[str, Axis]:
    cut = [found for module in model.modules() if (found := described(module)) is not None]
    return {name: axis for found in cut for name, axis in found.axes.items()}


def _axes_of_weights(model: nn.Module) -> dict[str, Axis]:
    meshes = {p.device_mesh for p in model.parameters() if is_distributed(p)}
    found = [Axis.of(mesh, dim) for mesh in meshes for dim in range(mesh.ndim)]
    return {axis.name: axis for axis in sorted(found, key=lambda axis: axis.name)}


def _innermost(model: Any) -> Any:
    return getattr(model, "module", model)


__all__ = ["DATA_AXES", "Engines"]
