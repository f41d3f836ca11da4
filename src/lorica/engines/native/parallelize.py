"""Cutting a Llama-like transformers model in place, on tensor-parallel degrees that transformers refuses too."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lorica.engines.native.base import Native
from lorica.engines.native.blocks import Block, Change, Cutter, children_with_parameters, decoder_of, set_heads
from lorica.engines.native.sequence import Region, enter_block
from lorica.engines.site import Axis
from lorica.errors import LayoutError

#: Mesh dimensions over which FSDP2 shards storage.
SHARDING = ("fsdp", "dp_shard")
#: Mesh dimensions that may be there besides.
OTHERS = ("tp", "pp", "dp", "dp_replicate")


@dataclass
class _Plan:
    """What will be changed."""

    changes: list[Change]
    blocks: list[Block]
    tied: list[tuple[nn.Module, Change]]
    partial: list[nn.Module]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    sequence_parallel: bool = False,
    kv_size_multiplier: int | None = None,
    order: Literal["strided", "neighbours"] = "strided",
    whole: Collection[str] = (),
) -> nn.Module:
    """Cut a Llama-like transformers model in place: Llama, Mistral, Qwen 2 and 3, Gemma, Phi-3 and their like.

    Over the mesh dimension ``"tp"``: q, k, v, gate and up (also fused) by columns, ``o_proj`` and ``down_proj`` by
    rows, the embedding by words, the head by words with its output gathered. Each key/value head lies on several ranks
    where there are more ranks than heads. Parameters stay plain local tensors; tied weights stay one parameter. What
    each rank has of a dimension need not be equal, except for heads. A mixture of experts is left whole.

    Collectives per layer, with frozen weights: forward two all-reduces, backward two (one each at the attention and
    the MLP block). With ``sequence_parallel``: forward two all-gathers and two reduce-scatters, backward the same.
    Beside the layers: an all-reduce after the embedding, an all-gather of the logits, an all-reduce of the head's input
    gradient; with ``sequence_parallel`` also one all-gather after the last norm, and one of the gradient before the
    first layer.

    Over ``"fsdp"`` or ``"dp_shard"``, ``fully_shard`` is applied to each decoder layer and to the rest. ``"dp"``,
    ``"dp_replicate"`` and ``"pp"`` are only noted: batches and stages are the caller's
    (:func:`split_stages` cuts a model into stages, after this).

    Sets on the model ``lorica_mesh``: name → :class:`Axis` of every mesh dimension; and on every module whose trained
    parameters would have partial gradients ``sequence_axes``: names of the axes over which they add up.

    Attentions that are put out (``output_attentions``) are those of this rank's heads, hidden states
    (``output_hidden_states``) under sequence parallelism those of its tokens. Dropout on what all ranks have, and
    sampling, need the same random state on all of them.

    Args:
        model: a whole model, the same on every rank of the axis; without adapters.
        mesh: a device mesh with named dimensions.
        sequence_parallel: whether norms and residual stream see this rank's tokens only.
        kv_size_multiplier: ranks that hold each key/value head; None: as few as the axis needs.
        order: which copies lie where, see :func:`lorica.layout.grouped_heads`.
        whole: last names of blocks to be left as they are on every rank, such as ``"mlp"`` or ``"lm_head"``.

    Returns:
        The model.

    Raises:
        LayoutError: something cannot be cut. Nothing was changed.
    """
    axes = _axes(mesh)
    if hasattr(model, "lorica_mesh"):
        raise LayoutError("the model is cut already")
    shard = [name for name in SHARDING if name in axes and axes[name].size > 1]
    if shard and "pp" in axes and axes["pp"].size > 1:
        raise LayoutError(f"{shard[0]!r} and 'pp' on one mesh: stages of fully-sharded layers are not supported")
    _, decoder = decoder_of(model)
    axis = axes.get("tp")
    if axis is not None and axis.size > 1:
        _cut(model, decoder, axis, sequence_parallel, kv_size_multiplier, order, whole)
    elif sequence_parallel and axis is None:
        raise LayoutError(f"sequence_parallel needs a mesh dimension 'tp', not only {mesh.mesh_dim_names}")
    model.lorica_mesh = axes  # type: ignore[assignment]
    for name in shard:
        from torch.distributed.fsdp import fully_shard

        for layer in decoder.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh[name])
        fully_shard(model, mesh=mesh[name])
    return model


def _axes(mesh: DeviceMesh) -> dict[str, Axis]:
    names = mesh.mesh_dim_names
    unknown = set(names or ()) - {*SHARDING, *OTHERS}
    if not names or unknown:
        raise LayoutError(
            f"a mesh of {names}: its dimensions need names, and those are of {sorted({*SHARDING, *OTHERS})}"
        )
    return {name: Axis.of(mesh, dim) for dim, name in enumerate(names)}


def _cut(
    model: nn.Module,
    decoder: Any,
    axis: Axis,
    sequence_parallel: bool,
    multiplier: int | None,
    order: Literal["strided", "neighbours"],
    whole: Collection[str],
) -> None:
    cutter = Cutter(axis, sequence_parallel=sequence_parallel)
    plan = _Plan([], [], [], [])
    _plan_layers(model, decoder, cutter, plan, multiplier, order, whole)
    _plan_ends(model, cutter, plan, whole)
    region = Region(axis) if sequence_parallel else None
    for block in plan.blocks:
        for change in block.changes:
            change.apply()
        if block.heads is not None:
            set_heads(block.module, len(block.heads.query[axis.rank]), len(block.heads.kv[axis.rank]))
        enter_block(block.module, axis, region)
        for module in block.inside:
            _mark(module, axis)
    for change in plan.changes:
        change.apply()
    for head, embedding in plan.tied:
        head.weight = embedding.cut.weight
    if region is not None:
        region.begin(decoder.layers[0])
        region.end(decoder.norm)
        decoder.lorica_region = region
        for module in (*plan.partial, decoder.norm):
            _mark(module, axis)


def _mark(module: nn.Module, axis: Axis) -> None:
    for inner in module.modules():
        inner.sequence_axes = (axis.name,)  # type: ignore[assignment]


def _plan_layers(
    model: nn.Module,
    decoder: Any,
    cutter: Cutter,
    plan: _Plan,
    multiplier: int | None,
    order: Literal["strided", "neighbours"],
    whole: Collection[str],
) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    for layer in decoder.layers:
        if cutter.sequence_parallel and layer._parameters:
            raise LayoutError(
                f"{names[id(layer)]}: parameters of its own {list(layer._parameters)}: no sequence_parallel"
            )
        for short, child in children_with_parameters(layer):
            name = names[id(child)]
            if short == "self_attn":
                if short not in whole:
                    plan.blocks.append(cutter.attention(name, child, decoder.config, multiplier, order))
                elif cutter.sequence_parallel:
                    raise LayoutError(f"{name}: attention that is left whole needs all tokens: no sequence_parallel")
            elif short == "mlp" and short not in whole and not hasattr(child, "experts"):
                plan.blocks.append(cutter.mlp(name, child))
            elif short == "mlp" or short in whole or not any(isinstance(m, nn.Linear) for m in child.modules()):
                plan.partial.append(child)  # a norm, experts: each rank works on the tokens it has
            else:
                raise LayoutError(f"{name}: a {type(child).__name__} in a decoder layer is not known; see `whole`")


def _plan_ends(model: Any, cutter: Cutter, plan: _Plan, whole: Collection[str]) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    place, change = names[id(embedding)], None
    left = {place.rpartition(".")[2], names.get(id(head), "").rpartition(".")[2]} & set(whole)
    if tied and left:
        raise LayoutError(f"{sorted(left)}: embedding and head share their weight: both are left whole, or none")
    if place.rpartition(".")[2] not in whole:
        change = cutter.embedding(model.get_submodule(place.rpartition(".")[0]), place)
        plan.changes.append(change)
    if head is None or names[id(head)].rpartition(".")[2] in whole:
        return
    place = names[id(head)]
    plan.changes.append(cutter.head(model.get_submodule(place.rpartition(".")[0]), place))
    if tied and change is not None:
        plan.tied.append((plan.changes[-1].cut, change))


# ---- the whole base model again --------------------------------------------------------------------------------------


@torch.no_grad()
def gather_model_state(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the logical state of a cut base model, tensor by tensor, on the first rank of every axis.

    Every rank has to go through it to the end; all but the first get nothing. One whole tensor is held at a time. A
    weight that two modules share comes once, under its first name; from two stages it comes under both.

    Args:
        model: what :func:`parallelize` (and :func:`split_stages`) made, without adapters that are not merged.
    """
    axes: dict[str, Axis] = getattr(model, "lorica_mesh", {})
    first = all(axis.rank == 0 for axis in axes.values())
    stages = axes.get("pp")
    if stages is None or stages.size == 1:
        for name, tensor in _whole_tensors(model):
            if first:
                yield name, tensor
        return
    for stage in range(stages.size):
        for name, tensor in _from_stage(model, stage, stages):
            if first:
                yield name, tensor


def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for place, module in model.named_modules():
        for name, tensor in _own_state(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = f"{place}.{name}" if place else name
            if isinstance(module, Native):
                yield full, module.logical(name)
            else:
                yield full, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def _own_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _from_stage(model: nn.Module, stage: int, stages: Axis) -> Iterator[tuple[str, Tensor]]:
    """Yield what one stage has, on that stage and on the first."""
    mine = _whole_tensors(model) if stages.rank == stage else iter(())
    while True:
        name, tensor = next(mine, ("", None))
        if stage == 0:
            if tensor is None:
                return
            yield name, tensor
            continue
        described = [None if tensor is None else (name, tensor.shape, tensor.dtype)]
        dist.broadcast_object_list(described, group=stages.group, group_src=stage)
        if described[0] is None:
            return
        if stages.rank == stage and tensor is not None:
            dist.send(tensor.contiguous(), group=stages.group, group_dst=0)
        elif stages.rank == 0:
            full, shape, dtype = described[0]
            device = next(model.parameters()).device
            received = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(received, group=stages.group, group_src=stage)
            yield full, received


__all__ = ["gather_model_state", "parallelize"]
