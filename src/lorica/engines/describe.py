"""What the engines say of a model: where each of its layers lies among the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorica.engines import fsdp
from lorica.engines.dtensor import cuts_of
from lorica.engines.site import Axis, Opening, Site, opening_of
from lorica.layout import Layout, Roles

#: Names of mesh axes over which batches are divided, on models that :func:`lorica.parallel.parallelize` cut.
DATA_AXES = ("dp", "dp_replicate", "fsdp", "dp_shard")


class Engines:
    """Describes the layers of one model.

    Args:
        model: the base model, adapted or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._data: dict[str, Axis] = {}
        self._native: Mapping[str, Axis] = {}
        self._distributed = False
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        fsdp.reshard(model)
        self._storage = fsdp.data_axes(model)
        self._native = getattr(_innermost(model), "lorica_mesh", {})
        own = {name: axis for name, axis in self._native.items() if name in DATA_AXES}
        self._data = {name: axis for name, axis in {**own, **self._storage}.items() if axis.size > 1}
        self._distributed = bool(self._data or self._native) or any(isinstance(p, DTensor) for p in model.parameters())

    def site(self, name: str, module: nn.Module, weight_name: str, roles: Roles) -> Site | None:
        """Return where a base layer lies, or None where nothing is divided.

        Args:
            name: its full name, for messages.
            module: the base layer.
            weight_name: the parameter that is adapted.
            roles: the role of each dimension of that parameter.

        Raises:
            LayoutError: it is cut in a way that cannot be described.
        """
        if not self._distributed:
            return None
        weight: Tensor = getattr(module, weight_name)
        sequence = tuple(getattr(module, "sequence_axes", ()))
        axes = dict(self._data) | {axis: self._native[axis] for axis in sequence}
        data = tuple(self._data)
        if isinstance(layout := getattr(module, "layout", None), Layout):
            own: Mapping[str, Axis] = module.axes  # type: ignore[assignment]
            layout = replace(layout, sequence=(*layout.sequence, *sequence), data=data)
            return Site(layout, {**axes, **own}, Opening(module, "product"))
        sizes = _sizes(weight, roles)
        if not isinstance(weight, DTensor):
            opening = opening_of(module) if getattr(module, "_is_hooked", False) else None
            return Site(Layout(sizes, sequence=sequence, data=data), axes, opening)
        cuts, over = cuts_of(weight, roles, self._storage, name)
        layout = Layout(sizes, cuts, sequence=sequence, data=data)
        opening = opening_of(module) if cuts or getattr(module, "_is_hooked", False) else None
        return Site(layout, {**axes, **{axis.name: axis for axis in over}}, opening)


def _sizes(weight: Tensor, roles: Roles) -> dict[str, int]:
    named = zip(roles, weight.shape, strict=True)
    return {role: length for role, length in named if role in ("out", "in", "expert")}


def _innermost(model: Any) -> Any:
    return getattr(model, "module", model)
