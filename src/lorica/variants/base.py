"""What a variant of LoRA answers. Plain LoRA answers too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.init import Factors, InitRequest, target_generator
from lorica.layout import Roles
from lorica.ops import FactorShapes, Op
from lorica.ops.base import Host
from lorica.routing import Rows
from lorica.storage import Packed


class Hosting(Host, Protocol):
    """What a variant may ask of the adapted layer it works for.

    Attributes:
        op: the layer's mathematics.
        specs: the adapters of the layer by their names.
        notes: room for what a variant wants to find again in the next forward; emptied when an adapter comes or goes.
    """

    op: Op
    specs: dict[str, AdapterSpec]
    notes: dict[Any, Any]

    @property
    def rows(self) -> Rows | None:
        """Which adapter each row of the batch has, while a forward runs that says so."""

    def factors(self, name: str) -> Factors:
        """Return the factors of an adapter, attached to the graph."""

    @property
    def stored(self) -> Tensor | Packed:
        """What this rank has of the base weight, as it is stored."""

    def unmerged_weight(self) -> Tensor | Packed:
        """Return what this rank has of the base weight, without the adapters that are merged into it."""

    def share_at_rest(self) -> tuple[slice, slice]:
        """Return which rows and columns of this rank's delta belong to the weight that it has now."""


@dataclass(frozen=True)
class Extra:
    """A tensor that a variant has beside A and B.

    Attributes:
        name: below the layer in a file (``"lora_magnitude_vector"``).
        container: below the layer in the model, by the adapters' names.
        tensor: below that and the adapter's name (``"weight"``); empty: the adapter's name is the tensor's.
        roles: role of each dimension (see :mod:`lorica.layout`).
        shape: of what this rank has.
        trains: whether it is a parameter; otherwise a buffer.
    """

    name: str
    container: str
    tensor: str
    roles: Roles
    shape: torch.Size
    trains: bool = True

    def live(self, adapter: str) -> str:
        """Return the name below the layer in the model."""
        return f"{self.container}.{adapter}.{self.tensor}" if self.tensor else f"{self.container}.{adapter}"


class Variant:
    """Plain LoRA: ``y + s·B·A·x`` and ``W + s·B·A``.

    A variant overrides what it does otherwise. Variants hold no state; there is one object of each.

    Attributes:
        across: whether its part can be added outside of the base layer's collectives, where the input is not yet what
            the base weight is multiplied with (``a2a_experimental``).
        unmergeable: why it cannot be merged into the base weight; empty: it can.
        subtracts: whether an adapter takes something out of the base weight for good (:meth:`taken`). Such adapters
            have a base model of their own, and no others beside them.
        random: whether its forward draws random numbers in training, on which ranks have to agree.
    """

    across: ClassVar[bool] = True
    unmergeable: ClassVar[str] = ""
    subtracts: ClassVar[bool] = False
    random: ClassVar[bool] = False

    def options(self, config: Any, field: str, key: str) -> Any:
        """Return what :attr:`AdapterSpec.options` is to hold for the target ``key``: the value of the field that turns
        the variant on.

        Raises:
            TargetError: the options do not say what this target is to have.
        """
        value = getattr(config, field)
        return None if isinstance(value, bool) else value

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """Refuse a layer or a spec that this variant cannot have.

        Raises:
            TargetError: names the module and the reason.
        """

    def roles(self, op: Op, spec: AdapterSpec) -> tuple[Roles, Roles]:
        """Return the role of each dimension of A and of B."""
        return op.roles_a, op.roles_b

    def shapes(self, shapes: FactorShapes, op: Op, spec: AdapterSpec, where: str = "") -> FactorShapes:
        """Return the logical shapes of A and B, given those of plain LoRA.

        Raises:
            TargetError: they cannot be had for these sizes; ``where`` names the module.
        """
        return shapes

    def extras(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Sequence[Extra]:
        """Return the tensors that the adapter has beside A and B on this rank."""
        return ()

    def start(self, layer: Hosting, factors: Factors, spec: AdapterSpec, seed: int) -> Mapping[str, Tensor]:
        """Return the values that the extras start with, by name; random ones from generators of ``seed`` and the
        target's name (:func:`lorica.init.target_generator`). The base weight and the factors are as training finds
        them."""
        return {}

    def plain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Factors:
        """Return the factors of plain LoRA that an adapter amounts to (but for :meth:`gain`)."""
        return factors

    def in_forward(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Factors:
        """Return the same for one forward, where that is something else than what would be merged."""
        return self.plain(layer, factors, spec)

    def taken(self, request: InitRequest) -> Factors:
        """Return what the adapter takes out of the base weight, as logical plain factors of any rank (scale 1)."""
        raise NotImplementedError

    def add(self, y: Tensor, x: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return the output ``y`` with the adapter's part for the input ``x``, in the parallel state of ``y``."""
        z = layer.op.add(y, x, layer, self.in_forward(layer, factors, spec), spec)
        return self.after(z, layer, factors, spec)

    def after(self, z: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return what becomes of the base layer's output with the part of plain LoRA in it, ``z``."""
        return z

    def gain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor | None:
        """Return what multiplies ``W + s·B·A``, one number for every output that this rank keeps; None: nothing."""
        return None


def drawn(layer: Hosting, extra: Extra, seed: int, draw: Callable[[Tensor, torch.Generator], object]) -> Tensor:
    """Return this rank's slice of a random start. The logical tensor is drawn, from a generator of the target's own (of
    each fused projection's own), so that it does not depend on the layout.

    Args:
        layer: the adapted layer.
        extra: which tensor.
        seed: of the adapter.
        draw: fills a tensor on the CPU.
    """
    site, parts = layer.site, layer.op.parts(layer.base_layer)
    parent = layer.target_name.rpartition(".")[0]
    names = [f"{parent}.{part}" for part, _, _ in parts] or [layer.target_name]
    sizes = {} if site is None else site.layout.sizes
    first, *others = (sizes.get(role, size) for role, size in zip(extra.roles, extra.shape, strict=True))
    pieces = []
    for name in names:
        pieces.append(torch.empty(first // len(names), *others))
        draw(pieces[-1], target_generator(seed, f"{name}.{extra.name}"))
    whole = torch.cat(pieces)
    return whole if site is None else site.layout.take(whole, extra.roles, site.at)


def cut_along(layer: Hosting, tensor: Tensor, dim: int, role: str) -> Tensor:
    """Return what this rank's layer needs of a tensor that is whole along one dimension, cut as the layer is.

    Args:
        layer: the adapted layer.
        tensor: its other dimensions are this rank's already.
        dim: the dimension.
        role: what it is to the layer.
    """
    site = layer.site
    if site is None or site.layout.cut_of(role) is None:
        return tensor
    roles = tuple(role if index == dim else "" for index in range(tensor.dim()))
    return site.layout.take(tensor, roles, site.at)
