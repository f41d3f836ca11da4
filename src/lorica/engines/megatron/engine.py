"""Megatron-Core's layers as layouts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lorica.engines.megatron import checkpoint, te
from lorica.engines.megatron.across import across
from lorica.engines.megatron.experts import ROUTER, as_expert, expert_axes, expert_tensor_axis, is_expert
from lorica.engines.megatron.fused import tell, told
from lorica.engines.megatron.gradients import finish_with, mark, reduces
from lorica.engines.megatron.grouped import ExpertColumn, ExpertRow, unpack
from lorica.engines.megatron.groups import DATA, data_axis, stage_axis, tell_groups, tensor_axis
from lorica.engines.megatron.models import chunks_of
from lorica.engines.megatron.names import lies_elsewhere, number_globally
from lorica.engines.megatron.openings import MegatronOpening
from lorica.engines.megatron.recompute import let_inputs_need_gradients
from lorica.engines.megatron.te import TE_BARE, TE_LINEARS, TE_ROW, TE_WHOLE, is_alone, logical_sizes, te_axis
from lorica.engines.megatron.tied import tell_tied, unmergeable
from lorica.engines.placed import Kinds, Placed, describe_whole, described_once
from lorica.engines.registry import Checkpoints
from lorica.engines.site import Axis, Opening, Site
from lorica.engines.stages import EXPERTS
from lorica.errors import LayoutError
from lorica.layout import Layout, Roles, even

_LAYERS = "megatron.core.tensor_parallel.layers."
COLUMN, ROW, EMBEDDING = (
    _LAYERS + name for name in ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding")
)

EXPERT_COLUMN, EXPERT_ROW = (f"{cls.__module__}.{cls.__qualname__}" for cls in (ExpertColumn, ExpertRow))


class MegatronPlaced(Placed):
    """How one of Megatron's layers lies."""

    @property
    def splits_tokens(self) -> bool:
        """Whether what enters or leaves the layer is this rank's tokens."""
        scatters = getattr(self.module, "reduce_scatter_embeddings", False)
        gathered = getattr(self.module, "explicit_expert_comm", False)  # by the dispatcher of experts
        return bool((getattr(self.module, "sequence_parallel", False) and not gathered) or scatters)

    def place(self, axes: Mapping[str, Axis], data: tuple[str, ...]) -> Site:
        """Return where the layer is adapted; Megatron knows all axes that concern it.

        Raises:
            LayoutError: what is fused in it cannot be told apart.
        """
        if (fused := told(self.module)) is not None and fused.refusal:
            raise LayoutError(fused.refusal)
        if self.kind == ROUTER:  # adapters add to the logits, of which the routing is made
            return Site(self.layout, self.axes, Opening(self.module, "gating"))
        apart = tuple(name for name in (EXPERTS,) if name in self.axes)
        if self.kind in (EXPERT_COLUMN, EXPERT_ROW):  # they are called where their block has multiplied
            return Site(self.layout, self.axes, bias=0.0, apart=apart)
        if self.kind in (*TE_LINEARS, *TE_BARE):
            opening = te.opening(self.module, self.kind)
            inside = self.kind != TE_ROW and not self.module.te_return_bias
            return Site(self.layout, self.axes, opening, bias=float(inside))
        own = MegatronOpening(self.module, lookup=self.kind == EMBEDDING)
        # The bias is added after the reduction, or handed on to whoever fuses its addition.
        added = self.kind == COLUMN and not self.module.skip_bias_add
        site = Site(self.layout, self.axes, own, bias=float(added), apart=apart, unmergeable=unmergeable(self.module))
        linear = self.kind in (COLUMN, ROW)
        return replace(site, across=across(self.module, site, next(iter(self.axes.values())))) if linear else site


class MegatronEngine:
    """Megatron-Core, for the registry."""

    def knows(self, cls: type[nn.Module]) -> bool:
        """Whether a class is one of Megatron's layers, or derived from one."""
        return _KINDS.of(cls) is not None

    def describe(self, module: nn.Module) -> MegatronPlaced | None:
        """Return how a layer lies; worked out once, since forwards ask."""
        if _KINDS.of(type(module)) in TE_BARE and is_alone(module):
            return None
        return described_once(module, _described)

    def uncut(self, module: nn.Module) -> None:
        """Describe a copy as whole."""
        if (found := self.describe(module)) is not None:
            describe_whole(module, found)

    def prepare(self, model: nn.Module) -> None:
        """Tell layers what is fused in them and which groups there are, part stacks, number layers and experts."""
        if not _is_loaded():
            return  # no module is of its classes; a walk over all takes a tenth of an injection
        for module in [*model.modules()]:
            tell(module)
            unpack(module)
        tell_groups(model)
        number_globally(model)
        tell_tied(model)

    def adapted(self, model: nn.Module, finish: Callable[[nn.Module], None]) -> None:
        """Let gradients be summed after Megatron has finished them, and be there where layers run twice."""
        finish_with(model, finish)
        let_inputs_need_gradients(model)

    def mark(self, module: nn.Module, site: Site, parameter: nn.Parameter, roles: Roles) -> None:
        """Give a factor the attributes that Megatron's training loop reads."""
        mark(module, site, parameter, roles)

    def reduces(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Return the axes over which Megatron reduces a gradient in its buffers."""
        return reduces(parameter)

    def axes(self, model: nn.Module) -> Mapping[str, Axis]:
        """Return none but those of the layers."""
        return {}

    def stages(self, model: nn.Module) -> Axis | None:
        """Return the axis of pipeline stages of a model of Megatron's."""
        chunks = chunks_of(model)
        return stage_axis(chunks[0]) if chunks else None

    def lies_elsewhere(self, model: nn.Module, name: str) -> bool:
        """Whether what has a logical name is on another stage, or among another rank's experts."""
        return lies_elsewhere(model, name)

    def checkpoints(self) -> Checkpoints | None:
        """Return how Megatron writes them, once it is loaded, so that models may be its."""
        return checkpoint if _is_loaded() else None


def _is_loaded() -> bool:
    return "megatron.core" in sys.modules


def _described(module: Any) -> MegatronPlaced:
    kind = _KINDS.of(type(module))
    assert kind is not None
    routed = is_expert(module)
    axis = expert_tensor_axis(module) if routed else tensor_axis(module)
    axis = te_axis(module) if kind in (*TE_LINEARS, *TE_BARE) else axis
    layout = _LAYOUTS[kind](module, axis)
    if routed:
        return MegatronPlaced(module, kind, as_expert(module, layout), {axis.name: axis, **expert_axes(module)})
    return MegatronPlaced(module, kind, replace(layout, data=(DATA,)), {axis.name: axis, DATA: data_axis(module)})


def _column(module: Any, axis: Axis) -> Layout:
    sizes = dict(zip(("out", "in"), logical_sizes(module), strict=True))
    if (inside := told(module)) is not None and not inside.refusal:
        return Layout(sizes, (inside.cut(axis.name, axis.size),), inside.parts)
    return Layout(sizes, (even(axis.name, "out", sizes["out"], axis.size),))


def _row(module: Any, axis: Axis) -> Layout:
    sizes = dict(zip(("out", "in"), logical_sizes(module), strict=True))
    return Layout(sizes, (even(axis.name, "in", sizes["in"], axis.size),))


def _embedding(module: Any, axis: Axis) -> Layout:
    sizes = {"in": module.num_embeddings, "out": module.embedding_dim}
    return Layout(sizes, (even(axis.name, "in", module.num_embeddings, axis.size),))


def _router(module: Any, axis: Axis) -> Layout:
    """Whole on every rank, of whose tokens alone it makes logits under sequence parallelism."""
    sizes = {"out": module.num_experts, "in": module.config.hidden_size}
    return Layout(sizes, sequence=(axis.name,) if module.config.sequence_parallel else ())


def _whole(module: Any, axis: Axis) -> Layout:
    """Whole on every rank; Megatron marks its weight where a rank's tokens are its own."""
    sizes = dict(zip(("out", "in"), logical_sizes(module), strict=True))
    return Layout(sizes, sequence=(axis.name,) if getattr(module.weight, "sequence_parallel", False) else ())


#: The layout of each kind of layer over its tensor-parallel axis, but for what all of its axes have to do with tokens.
_LAYOUTS: dict[str, Callable[[Any, Axis], Layout]] = {
    COLUMN: _column,
    ROW: _row,
    EMBEDDING: _embedding,
    ROUTER: _router,
    EXPERT_COLUMN: _column,
    EXPERT_ROW: _row,
    **{kind: _row if kind == TE_ROW else _column for kind in TE_LINEARS},
    **dict.fromkeys((TE_WHOLE, *TE_BARE), _whole),
}

_KINDS = Kinds(_LAYOUTS)

__all__ = [
    "COLUMN",
    "EMBEDDING",
    "EXPERT_COLUMN",
    "EXPERT_ROW",
    "ROUTER",
    "ROW",
    "TE_LINEARS",
    "MegatronEngine",
    "MegatronPlaced",
]
