"""The norm of all gradients, in which every logical element counts once, whatever holds it and however often."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt.inject import base_of
from lorica.engines import Engines
from lorica.engines.kinds import is_distributed
from lorica.engines.rest import at_rest, gradient_of, storage_axes
from lorica.engines.site import Axis
from lorica.engines.stages import EXPERTS, STAGES
from lorica.ranks.gradients import sum_gradients
from lorica.ranks.trained import Trained, trained


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients of everything that trains so that their global norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_`` on one process; on many ranks the gradients are summed first if need be
    (:func:`sum_gradients`), every rank gets the same norm, and plain and distributed parameters may stand side by side.

    Args:
        model: the adapted model.
        max_norm: largest norm; infinity: only compute it.
        norm_type: p of the norm; infinity: the largest absolute value.
        error_if_nonfinite: raise where the norm is NaN or infinite.

    Returns:
        The norm before clipping, float32, on the device of the gradients.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.
    """
    sum_gradients(model)
    norm = get_total_norm(model, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"The total norm of order {norm_type} for gradients is {float(norm)}: nothing was clipped")
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [g for g in map(_local, _with_gradients(model)) if g is not None]
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))
    return norm


@torch.no_grad()
def get_total_norm(model: nn.Module, norm_type: float = 2.0) -> Tensor:
    """Return the global norm of the gradients as they are; collective where the model lies over ranks."""
    known = {id(item.parameter): item for item in trained(model)}
    totals: dict[tuple[str, ...], Tensor] = {}
    axes: dict[str, Axis] = dict(Engines(base_of(model)).axes)
    largest = math.isinf(norm_type)
    for parameter in _with_gradients(model):
        item = known.get(id(parameter))
        over = _held_over(parameter, item)
        axes |= over
        value = _power(_local(parameter), norm_type) if item is None or largest else _counted(item, norm_type)
        key = tuple(sorted(over))
        before = totals.get(key)
        totals[key] = value if before is None else torch.maximum(before, value) if largest else before + value
    for name in sorted(axes, key=lambda name: (name == STAGES, name == EXPERTS, name)):
        if name in (STAGES, EXPERTS) or any(name in key for key in totals):
            _reduce(totals, axes[name], largest=largest)
    if not totals:
        return torch.zeros(())
    values = torch.stack(list(totals.values()))
    return values.max() if largest else values.sum().pow(1 / norm_type)


def _reduce(totals: dict[tuple[str, ...], Tensor], axis: Axis, *, largest: bool) -> None:
    keys = [key for key in totals if axis.name in key or axis.name == STAGES]
    values = [totals.pop(key) for key in keys]
    if axis.name in (STAGES, EXPERTS):  # they hold different layers, so only their totals are comparable
        stacked = torch.stack(values or [torch.zeros(())])
        keys, values = [(axis.name,)], [stacked.max() if largest else stacked.sum()]
    reduced = torch.stack(values)
    dist.all_reduce(reduced, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=axis.group)
    totals.update(zip(keys, reduced, strict=True))


def _held_over(parameter: nn.Parameter, item: Trained | None) -> dict[str, Axis]:
    """Return the axes whose ranks hold different elements of a parameter."""
    if item is not None:
        return item.sharded_over
    return {axis.name: axis for _, axis in storage_axes(parameter)}


def _counted(item: Trained, norm_type: float) -> Tensor:
    """Return this rank's share of the sum of powers: each element counts by one over the ranks that hold it."""
    gradient, layout = item.local_gradient(), item.site.layout
    cut = layout.cut_of("out")
    if gradient is None or cut is None or "out" not in item.roles or not cut.uneven:
        return _power(gradient, norm_type) / layout.copies(item.roles)
    dim = item.roles.index("out")
    kept = at_rest(item.parameter, item.site).slices[dim]
    first, last, _ = kept.indices(cut.length(item.site.at[cut.axis]))
    values = [
        _power(gradient.narrow(dim, max(start, first) - first, min(stop, last) - max(start, first)), norm_type) / count
        for start, stop, count in cut.counted(item.site.at[cut.axis])
        if max(start, first) < min(stop, last)
    ]
    others = layout.copies(tuple(role for role in item.roles if role != "out"))
    return sum(values, torch.zeros((), device=gradient.device)) / others


def _power(gradient: Tensor | None, norm_type: float) -> Tensor:
    assert gradient is not None
    if not gradient.numel():
        return torch.zeros((), device=gradient.device)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient, norm_type, dtype=wide).float()
    return norm if math.isinf(norm_type) else norm.pow(norm_type)


def _with_gradients(model: nn.Module) -> Iterable[nn.Parameter]:
    return [parameter for parameter in model.parameters() if gradient_of(parameter) is not None]


def _local(parameter: nn.Parameter) -> Tensor | None:
    gradient = gradient_of(parameter)
    local: Tensor | None = gradient.to_local() if is_distributed(gradient) else gradient
    return local
