"""Statistics over ranks: inputs made whole, sums over batches, one result for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.engines.gather import gather
from lorica.engines.site import Axis, Site
from lorica.engines.stages import STAGES, axis_of_stages

T = TypeVar("T")


def there_are_others() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def data_groups(site: Site | None, *, everyone: bool = True) -> list[Any]:
    """Return the process groups over which batches are divided.

    Args:
        site: of a layer; None: nothing says how the ranks share batches, so that all of them count. Ranks that had the
            same batch do no harm then: each counts equally often.
        everyone: whether that is so.
    """
    if site is None:
        return [dist.group.WORLD] if everyone and there_are_others() else []
    return [site.axes[name].group for name in site.layout.averaged() if name in site.axes]


def summed(tensor: Tensor, groups: Iterable[Any]) -> Tensor:
    """Return the sum over all ranks of the groups, in memory of its own where there are any."""
    for number, group in enumerate(groups):
        tensor = tensor.clone() if number == 0 else tensor
        dist.all_reduce(tensor, group=group)
    return tensor


def whole_tokens(x: Tensor, site: Site | None) -> Tensor:
    """Return a layer's input ``[…, S, in]`` with all tokens of a sequence that is divided over ranks."""
    for axis in _sequence(site) if site is not None else ():
        x = torch.cat(_gathered(x.contiguous(), axis), -2)
    return x


def whole_features(x: Tensor, site: Site | None) -> Tensor:
    """Return rows ``[…, in]`` of a layer's input with all features, where the layer is cut by its inputs."""
    cut = site.layout.cut_of("in") if site is not None else None
    if site is None or cut is None:
        return x
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    shape = (len(flat), site.layout.sizes["in"])
    return gather(flat, site.layout, ("token", "in"), shape, site.axes).view(*x.shape[:-1], shape[1])


def _sequence(site: Site) -> list[Axis]:
    cut = site.layout.cut_of("in")
    names = [name for name in site.layout.sequence if cut is None or name != cut.axis]
    return [site.axes[name] for name in names if name in site.axes]


def _gathered(x: Tensor, axis: Axis) -> list[Tensor]:
    rows = [torch.empty_like(x) for _ in range(axis.size)]
    dist.all_gather(rows, x, group=axis.group)
    return rows


def agreed(tensors: Mapping[str, Tensor], site: Site | None, *, everyone: bool = True) -> dict[str, Tensor]:
    """Return one rank's values on all ranks that have the layer, so that what starts from them is equal bit for bit."""
    found = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if site is None:
        groups = [dist.group.WORLD] if everyone and there_are_others() else []
    else:
        groups = [axis.group for name, axis in sorted(site.axes.items()) if name != STAGES and axis.size > 1]
    for group in groups:
        for tensor in found.values():
            dist.broadcast(tensor, group=group, group_src=0)
    return found


def every(flag: bool, *, everyone: bool = True) -> bool:
    """Whether something holds on all ranks."""
    return all(_of_everyone(flag, everyone=everyone))


def together(iterable: Iterable[T], *, everyone: bool = True) -> Iterator[T]:
    """Yield batch after batch until the first rank has none left: what follows a batch is done by all ranks."""
    iterator = iter(iterable)
    end = object()
    while True:
        item: Any = next(iterator, end)
        if not every(item is not end, everyone=everyone):
            return
        yield item


def told(mine: Mapping[str, T], *, everyone: bool = True) -> dict[str, T]:
    """Return what all ranks know, by name; where two know of the same, what the first one says."""
    found: dict[str, T] = {}
    for theirs in _of_everyone(dict(mine), everyone=everyone):
        found = {**theirs, **found}
    return found


def _of_everyone(mine: T, *, everyone: bool) -> list[T]:
    """Return what each rank has; torch knows on which device its backend carries objects, whatever both are called."""
    if not everyone or not there_are_others():
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def of_all_stages(model: nn.Module, mine: Mapping[str, T]) -> dict[str, T]:
    """Return what the ranks of all pipeline stages have, by name."""
    axis = axis_of_stages(model)
    if axis is None:
        return dict(mine)
    parts: list[Any] = [None] * axis.size
    dist.all_gather_object(parts, dict(mine), group=axis.group)
    return {name: value for part in parts for name, value in part.items()}


def first_says(value: T) -> T:
    """Return what rank 0 found, on all ranks: whether a file is there is a question that ranks must answer alike."""
    if not there_are_others():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not there_are_others() or dist.get_rank() == 0


__all__ = [
    "agreed",
    "data_groups",
    "every",
    "first_says",
    "is_first",
    "of_all_stages",
    "summed",
    "there_are_others",
    "together",
    "told",
    "whole_features",
    "whole_tokens",
]
