"""Gradients of an adapter whose layers lie over ranks: made whole once per optimiser step.

A factor that is replicated over an axis which divides its layer sees a share of the sum there; on a data axis it sees a
share of the batches. Which axes these are follows from the layout. All gradients that an axis has to reduce travel in
one buffer: one collective per axis and optimiser step, whatever the number of layers and of accumulated passes.

Data axes come first. After that the ranks of a data axis agree, so the sums over the other axes start from the same
numbers on all of them, and replicas stay equal bit for bit. A gradient that is whole already on an axis whose ranks
all have it is averaged there for the same reason: equal in theory, it need not be in the last digit on an accelerator.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorica.adapt.inject import base_of, lora_layers, switch_of
from lorica.engines.registry import ENGINES
from lorica.engines.rest import at_rest
from lorica.engines.site import Axis
from lorica.engines.stages import STAGES, axis_of_stages
from lorica.ranks.agreement import verify
from lorica.ranks.trained import Trained, trained


class _Share(NamedTuple):
    """One gradient in the buffer of one axis."""

    item: Trained
    mean: bool


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Make the gradients of all adapters whole: summed over the axes that divide layers, averaged over data axes.

    Before the first sum since an adapter was added, all ranks compare what they train (:func:`verify`).

    To be called once between the last backward pass and anything that reads gradients; :func:`clip_grad_norm_` and the
    optimiser's ``step`` call it by themselves if it was not. A second call changes nothing.

    Args:
        model: the adapted model. All ranks must call with the same adapters training.

    Raises:
        RankError: the ranks do not train the same adapter; on every rank, before anything is summed.
    """
    switch = switch_of(model)
    if switch is None or not switch.pending:
        return
    if not switch.agreed and _all_come(model):
        verify(model)
    switch.pending = False
    items = trained(model)
    for axis, shares in _by_axis(items):
        _reduce(shares, axis)
    for item in items:
        batches = 1 if item.reduced_elsewhere else item.site.layout.batches
        if batches > 1 and (gradient := item.local_gradient()) is not None:
            gradient.div_(batches)


def _all_come(model: nn.Module) -> bool:
    """Whether every rank has something to sum: a stage may be without targets, and so may a rank's experts."""
    if axis_of_stages(base_of(model)) is not None:
        return False
    sites = [layer.site for layer in lora_layers(model)]
    return not sites or any(site is None or not any(site.axes[name].size > 1 for name in site.apart) for site in sites)


def buckets(model: nn.Module) -> list[tuple[Axis, list[tuple[nn.Parameter, int]]]]:
    """Return what :func:`sum_gradients` sends: each axis with its parameters and how many float32 numbers of each."""
    return [
        (axis, [(share.item.parameter, 1 + _length(share, axis)) for share in shares])
        for axis, shares in _by_axis(trained(model))
    ]


def _by_axis(items: Sequence[Trained]) -> Iterator[tuple[Axis, list[_Share]]]:
    """Yield every axis over which gradients are reduced, data axes first, with its share of them."""
    axes = {axis.name: axis for item in items for axis in item.site.axes.values() if axis.size > 1}
    data = {name for item in items for name in item.site.layout.averaged()}
    for name in sorted(axes, key=lambda name: (name not in data, name)):
        if shares := [share for item in items if (share := _share(item, name)) is not None]:
            yield axes[name], shares


def _length(share: _Share, axis: Axis) -> int:
    local = at_rest(share.item.parameter).local
    rows = _logical_rows(share, local, axis)
    return local.numel() if rows is None else rows * math.prod(local.shape[1:])


def _share(item: Trained, axis: str) -> _Share | None:
    """Return how a gradient takes part in the reduction over an axis; None where it does not."""
    layout = item.site.layout
    if axis not in item.site.axes or axis in item.stored_over or axis == STAGES or axis in item.site.own_factors_over:
        return None  # stages hold different layers
    if axis in item.reduced_elsewhere:
        return None
    if axis in layout.summed(item.roles):
        return _Share(item, mean=False)
    return None if axis in layout.sharded(item.roles) else _Share(item, mean=True)


def _reduce(shares: Sequence[_Share], axis: Axis) -> None:
    gradients = [share.item.local_gradient() for share in shares]
    device = next((g.device for g in gradients if g is not None), shares[0].item.parameter.device)
    pieces = [_packed(share, gradient, axis) for share, gradient in zip(shares, gradients, strict=True)]
    there = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.float32)
    buffer = torch.cat([there.to(device), *(piece.to(device) for piece in pieces)])
    dist.all_reduce(buffer, group=axis.group)
    present, start = buffer[: len(shares)].tolist(), len(shares)
    for share, gradient, piece, ranks in zip(shares, gradients, pieces, present, strict=True):
        values = buffer[start : start + piece.numel()]
        start += piece.numel()
        if not ranks:
            continue  # nobody had a gradient: the optimiser is to pass over this parameter, as on one process
        if gradient is None:
            share.item.parameter.grad = torch.zeros_like(share.item.parameter)
            gradient = share.item.local_gradient()
            assert gradient is not None
        _unpack(share, gradient, values.div_(axis.size) if share.mean else values, axis)


def _packed(share: _Share, gradient: Tensor | None, axis: Axis) -> Tensor:
    """Return the gradient as this rank's summand: flat, at least float32; copied rows in the place of logical ones."""
    if gradient is None:
        gradient = torch.zeros_like(at_rest(share.item.parameter).local)
    rows = _logical_rows(share, gradient, axis)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if rows is None:
        return gradient.reshape(-1).to(wide)
    whole = torch.zeros((rows, *gradient.shape[1:]), dtype=wide, device=gradient.device)
    for logical, local in _places(share):
        whole[logical] = gradient[local].to(wide)
    return whole.flatten()


def _unpack(share: _Share, gradient: Tensor, values: Tensor, axis: Axis) -> None:
    rows = _logical_rows(share, gradient, axis)
    if rows is None:
        gradient.copy_(values.view(gradient.shape))
        return
    whole = values.view(rows, *gradient.shape[1:])
    for logical, local in _places(share):
        gradient[local] = whole[logical].to(gradient.dtype)


def _logical_rows(share: _Share, gradient: Tensor, axis: Axis) -> int | None:
    """Return the number of rows of the logical gradient where ranks hold copies of its rows, else None."""
    if axis.name not in share.item.site.layout.sharded(share.item.roles) or share.item.roles[0] != "out":
        return None
    return share.item.site.layout.sizes["out"]


def _places(share: _Share) -> Iterable[tuple[slice, slice]]:
    place = 0
    layout = share.item.site.layout
    for start, stop in layout.held("out", layout.sizes["out"], share.item.site.at):
        yield slice(start, stop), slice(place, place + stop - start)
        place += stop - start


# ---- without being asked --------------------------------------------------------------------------------------------

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_HOOKS: list[Any] = []


def watch(model: nn.Module) -> None:
    """Sum the gradients of ``model`` before an optimiser steps, should nobody have done it.

    Nothing is watched where no layer lies over ranks.
    """
    if any(layer.site is not None for layer in lora_layers(model)):
        _WATCHED.add(model)
        switch = switch_of(model)
        assert switch is not None
        switch.agreed = False
        for engine in ENGINES:
            engine.adapted(model, sum_gradients)
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for model in list(_WATCHED):
        switch = switch_of(model)
        if switch is None or not switch.pending:
            continue
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(item.parameter) in stepped for item in trained(model)):
            sum_gradients(model)
