"""Where a base layer lies on this rank: its layout, the mesh axes it lies over, and the way into its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lorica.engines.kinds import is_distributed
from lorica.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


Forward = Callable[..., Any]


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it.

    Attributes:
        name: its name in the mesh.
        size: ranks on it.
        rank: this rank's coordinate.
        group: the process group of the ranks on it; None on the ``fake`` backend's plans, where nothing is sent.
    """

    name: str
    size: int
    rank: int
    group: Any = field(repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self  # a process group cannot be copied, and is the same one for every copy of a model

    @classmethod
    def of(cls, mesh: DeviceMesh, dim: int) -> Axis:
        """Return one dimension of a device mesh."""
        names = mesh.mesh_dim_names
        name = names[dim] if names else f"dim{dim}"
        return cls(name, mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim))

    @classmethod
    def of_group(cls, name: str, group: Any) -> Axis:
        """Return the axis of a process group; None, as without any process group, is one rank."""
        return cls(name, 1, 0, None) if group is None else cls(name, group.size(), group.rank(), group)


@dataclass(frozen=True)
class Site:
    """One base layer on this rank.

    Attributes:
        layout: how its logical weight lies over the axes.
        axes: every axis over which the model is divided.
        opening: the way into its forward; None where calling it from outside is the same.
        bias: how much of the base layer's bias the output holds at the opening: all, none (it is added after the
            reduction), or this rank's share of it.
        carry: what the hidden values of an adapter, ``[…, r]`` with the leading sizes of the input, go through between
            A and B; None: nothing.
        across: the same layer where its input is not gathered yet and its output is reduced already, if adapters may be
            added there too: their hidden values are carried, and each product sees its rank's tokens.
        unmergeable: why no delta may go into the weight for good; empty: it may.
        apart: axes whose ranks have other layers in this one's place, with weights and names of their own: experts that
            are modules. Nothing is reduced over them, unless the layout says that their tokens are seen by one adapter.
    """

    layout: Layout
    axes: Mapping[str, Axis] = field(default_factory=dict)
    opening: Opening | None = None
    bias: float = 1.0
    carry: Callable[[Tensor], Tensor] | None = None
    across: Site | None = None
    apart: tuple[str, ...] = ()
    unmergeable: str = ""

    @property
    def at(self) -> dict[str, int]:
        """This rank's coordinates."""
        return {name: axis.rank for name, axis in self.axes.items()}

    @property
    def own_factors_over(self) -> tuple[str, ...]:
        """The axes of :attr:`apart` whose ranks have factors of their own too, rather than one adapter for all."""
        return tuple(name for name in self.apart if name not in self.layout.sequence)


class Opening:
    """The innermost forward of a base layer.

    Engines wrap a layer's forward: inputs are gathered or scattered before it, outputs reduced after it. What is put
    here runs inside the wrapper, on the same tensors as the base layer's own product. So an adapter's partial sums and
    input gradients ride on the collectives that the base layer has anyway.

    Args:
        owner: the object that holds the innermost forward.
        name: its attribute, or ``"cell_contents"`` of a closure's cell.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        self._name = name
        self._own = True
        self.original: Forward = getattr(owner, name)

    def again(self) -> Opening:
        """Return another one at the same place, for what goes around all that was put there until now."""
        return Opening(self._owner, self._name)

    def put(self, forward: Forward) -> None:
        """Let the engine's wrapper call ``forward``, which may call :attr:`original`: what was there until now."""
        self._own = self._name in vars(self._owner) if isinstance(self._owner, nn.Module) else True
        self.original = getattr(self._owner, self._name)
        setattr(self._owner, self._name, _Put(self, forward))

    def close(self) -> None:
        """Put the original back; what was put around it since stays there."""
        outer, current = None, getattr(self._owner, self._name)
        while isinstance(current, _Put) and current.opening is not self:
            outer, current = current.opening, current.opening.original
        if not isinstance(current, _Put):
            return
        if outer is not None:
            outer.original, outer._own = self.original, self._own
        elif self._own:
            setattr(self._owner, self._name, self.original)
        else:
            delattr(self._owner, self._name)


class _Put:
    """What stands in an opening."""

    def __init__(self, opening: Opening, forward: Forward) -> None:
        self.opening = opening
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def opening_of(module: nn.Module) -> Opening:
    """Return the way into the forward of a module, however often it was wrapped.

    A wrapper is an instance attribute ``forward`` that closes over the forward it replaced (transformers), over an
    object that does (its expert dispatch), or there is none, and hooks run around the class's own (torch).
    """
    place: tuple[Any, str] = (module, "forward")
    forward = module.__dict__.get("forward")
    while (inner := _wrapped_by(forward)) is not None:
        place = inner
        forward = getattr(*place)
    return Opening(*place)


def _wrapped_by(forward: Any) -> tuple[Any, str] | None:
    code = getattr(forward, "__code__", None)
    cells = dict(zip(code.co_freevars, forward.__closure__ or (), strict=True)) if code is not None else {}
    for name, cell in cells.items():
        if name == "original_forward":
            return cell, "cell_contents"
        if hasattr(cell.cell_contents, "experts_forward"):
            return cell.cell_contents, "experts_forward"
    return None


def localise(site: Site, x: Any, y: Any) -> tuple[Any, Any, Callable[[Tensor], Tensor]]:
    """Return the local tensors of a layer's input and output, and the way back to what the output was.

    The gradient of ``x`` is partial over an axis that cuts the layer's rows and does not cut ``x``; left so, it joins
    the base layer's own in one sum.
    """
    if is_distributed(x):
        x = x.to_local(grad_placements=[_of_input(site, x, dim) for dim in range(x.device_mesh.ndim)])
    if not is_distributed(y):
        return x, y, _same
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements, shape, stride = y.device_mesh, y.placements, y.shape, y.stride()

    def back(local: Tensor) -> Tensor:
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    gradient = [Replicate() if placement.is_partial() else placement for placement in placements]
    local = y.to_local(grad_placements=gradient)
    for placement in placements:
        mask = getattr(getattr(placement, "mask_buffer", None), "data", None)
        if mask is not None:  # a lookup's rows for words of other ranks, which the sum would leave out later
            local = local.masked_fill(mask.unsqueeze(-1), 0)
    return x, local, back


def _of_input(site: Site, x: DTensor, dim: int) -> Placement:
    placement: Placement = x.placements[dim]
    cut = site.layout.cut_of("out")
    if placement.is_replicate() and cut is not None and cut.axis == Axis.of(x.device_mesh, dim).name:
        from torch.distributed.tensor import Partial

        return Partial()
    return placement


def _same(local: Tensor) -> Tensor:
    return local


__all__ = ["Axis", "Forward", "Opening", "Site", "localise", "opening_of"]
