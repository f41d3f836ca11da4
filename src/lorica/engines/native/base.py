"""What every native layer has: a layout, the axes it lies over, and the way between local and whole weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Self

from lorica.engines.gather import gather_parameter
from lorica.engines.site import Axis, Opening, Site
from lorica.errors import LayoutError
from lorica.layout import Cut, Layout, Roles

#: One axis: as this rank sees it, or a device mesh of one dimension (``mesh["tp"]``).
AxisLike = Axis | DeviceMesh


def axis_of(axis: AxisLike) -> Axis:
    """Return the axis itself, or that of a device mesh of one dimension.

    Raises:
        LayoutError: the mesh has several dimensions.
    """
    if isinstance(axis, Axis):
        return axis
    if axis.ndim != 1:
        raise LayoutError(f"one axis is needed, not a mesh of {axis.mesh_dim_names}; take one: mesh['tp']")
    return Axis.of(axis, 0)


class Native(nn.Module):
    """A layer whose parameters are plain tensors, each this rank's piece of a logical one.

    Its forward calls ``self.product``, which sees the input as gathered and returns the output before any reduction.
    Whatever is added there rides on the layer's own collectives; an instance attribute ``product`` replaces it.
    Where the layer gathers its rank's tokens itself, or leaves each rank its tokens of a sum, ``self.spanning`` is the
    product with that collective, and ``self.carry`` does to an adapter's hidden values what it does to activations.

    Attributes:
        layout: how the logical weight lies over the axes.
        axes: every axis that the layout names.
        roles: the role of each dimension of each parameter.
    """

    layout: Layout
    axes: dict[str, Axis]
    roles: ClassVar[Mapping[str, Roles]]

    def product(self, x: Tensor) -> Tensor:
        """Return this rank's output for the input it needs."""
        raise NotImplementedError

    def spanning(self, x: Tensor) -> Tensor:
        """Return the product with the layer's collective of tokens: from this rank's input to this rank's output."""
        raise NotImplementedError

    def carry(self, h: Tensor) -> Tensor:
        """Return the hidden values ``[…, r]`` of an adapter after the layer's collective of tokens."""
        raise NotImplementedError

    def site(self, layout: Layout, axes: Mapping[str, Axis]) -> Site:
        """Return where this layer lies, given what is known of it from outside: its layout and all axes."""
        # The product leaves the bias to be added after the sum of a layer cut by its inputs, be it for one rank.
        bias = 1.0 if layout.cut_of("in") is None else 0.0
        across = None
        if self.splits_tokens:
            apart = replace(layout, sequence=tuple(dict.fromkeys((*layout.sequence, *self.axes))))
            across = Site(apart, axes, Opening(self, "spanning"), bias, carry=self.carry)
        return Site(layout, axes, Opening(self, "product"), bias, across=across)

    def place(self, axes: Mapping[str, Axis], data: tuple[str, ...]) -> Site:
        """Return where this layer is adapted, among all axes of its model; ``data`` divide batches."""
        sequence = (*self.layout.sequence, *getattr(self, "sequence_axes", ()))
        return self.site(replace(self.layout, sequence=sequence, data=data), {**axes, **self.axes})

    @property
    def splits_tokens(self) -> bool:
        """Whether what leaves or enters the layer is this rank's tokens."""
        return bool(getattr(self, "sequence_parallel_enabled", False))

    @property
    def at(self) -> dict[str, int]:
        """This rank's coordinates."""
        return {name: axis.rank for name, axis in self.axes.items()}

    # ---- local and logical -----------------------------------------------------------------------------------------

    def logical_shape(self, name: str) -> torch.Size:
        """Return the shape that the parameter ``name`` has when whole."""
        local = self.get_parameter(name).shape
        sizes: Mapping[str, int] = {str(role): size for role, size in self.layout.sizes.items()}
        return torch.Size(sizes.get(role, length) for role, length in zip(self.roles[name], local, strict=True))

    @torch.no_grad()
    def logical(self, name: str) -> Tensor:
        """Return the whole parameter ``name``. Every rank of the axis has to call this."""
        return gather_parameter(self.get_parameter(name).detach(), Site(self.layout, self.axes), self.roles[name])

    @torch.no_grad()
    def load_logical(self, name: str, whole: Tensor) -> None:
        """Copy this rank's piece of the whole parameter ``name`` into it.

        Raises:
            LayoutError: the shape is not that of the whole parameter.
        """
        if whole.shape != self.logical_shape(name):
            raise LayoutError(f"{name}: {tuple(whole.shape)} is not {tuple(self.logical_shape(name))}")
        self.get_parameter(name).copy_(self.layout.take(whole, self.roles[name], self.at))

    @classmethod
    def like(cls, whole: nn.Module, axis: AxisLike, **options: Any) -> Self:
        """Return the layer that a whole one becomes, on the meta device: without weights yet.

        Raises:
            LayoutError: the whole one cannot be cut.
        """
        raise NotImplementedError

    def adopt(self, whole: nn.Module) -> None:
        """Take this rank's pieces of the parameters of a whole module, and whether they train."""
        for name, roles in self.roles.items():
            parameter = getattr(whole, name, None)
            if parameter is not None:
                local = self.layout.take(parameter.detach(), roles, self.at)
                setattr(self, name, nn.Parameter(local, requires_grad=parameter.requires_grad))
        self.train(whole.training)

    def reset_parameters(self) -> None:
        """Draw the whole parameters, as the uncut layer would, and keep this rank's pieces: the same on any layout."""
        raise NotImplementedError


class NativeEngine:
    """The engine of the layers above, for the registry: each describes itself."""

    def knows(self, cls: type[nn.Module]) -> bool:
        """Whether a class is one of these layers."""
        return issubclass(cls, Native)

    def describe(self, module: nn.Module) -> Native | None:
        """Return the layer itself."""
        return module if isinstance(module, Native) and "layout" in module.__dict__ else None

    def uncut(self, module: nn.Module) -> None:
        """Give a copy whose weight is whole a layout without cuts."""
        assert isinstance(module, Native)
        module.layout = Layout(dict(module.layout.sizes), (), module.layout.parts)

    def prepare(self, model: nn.Module) -> None:
        """Nothing: a layer knows everything."""

    def adapted(self, model: nn.Module, finish: Callable[[nn.Module], None]) -> None:
        """Nothing: there is no training loop that would have to know."""

    def mark(self, module: nn.Module, site: Site, parameter: nn.Parameter, roles: Roles) -> None:
        """Nothing."""

    def reduces(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """None."""
        return ()

    def axes(self, model: nn.Module) -> Mapping[str, Axis]:
        """Return the mesh that a model was cut over."""
        found: Mapping[str, Axis] = getattr(model, "lorica_mesh", {})
        return found

    def stages(self, model: nn.Module) -> Axis | None:
        """Return the mesh's axis of stages."""
        return self.axes(model).get("pp")

    def lies_elsewhere(self, model: nn.Module, name: str) -> bool:
        """Whether a name is of another stage: no, something stands in the place of everything."""
        return False

    def checkpoints(self) -> None:
        """None of its own."""


def need_plain(module: nn.Module, cls: type[nn.Module], where: str = "") -> None:
    """Refuse to cut a module that is not ``cls`` with an unquantised weight.

    Args:
        module: to be cut.
        cls: ``nn.Linear`` or ``nn.Embedding``.
        where: its full name, for the message.

    Raises:
        LayoutError: says what it is.
    """
    weight: Any = getattr(module, "weight", None)
    own = type(module).forward is cls.forward or hasattr(module, "embed_scale")
    plain = type(weight) is nn.Parameter and weight.is_floating_point()
    if not (isinstance(module, cls) and own and plain) or isinstance(module, Native):
        raise LayoutError(
            f"{where}{': ' if where else ''}a {type(module).__name__} with a weight of type {type(weight).__name__} "
            f"cannot be cut; a plain {cls.__name__} is needed, before anything wraps, quantises or adapts it"
        )


@functools.lru_cache(maxsize=256)
def _held_order(cut: Cut) -> tuple[int, ...] | None:
    order = tuple(place for held in cut.held for start, stop in held for place in range(start, stop))
    return None if order == tuple(range(len(order))) else order


def held_order(cut: Cut, device: torch.device) -> Tensor | None:
    """Return the logical position of each row when the ranks' pieces lie one after the other; None: as they are."""
    order = _held_order(cut)
    return None if order is None else torch.tensor(order, device=device)


__all__ = ["AxisLike", "Native", "NativeEngine", "axis_of", "held_order", "need_plain"]
