"""What every op answers: shapes of the factors, the forward with them, and the delta as a product of two matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.engines.describe import Engines
from lorica.engines.site import Site, localise
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.layout import Roles
from lorica.ops.dropout import drop
from lorica.storage import Packed, stored_weight

Running = Iterable[tuple[Factors, AdapterSpec]]


class Host(Protocol):
    """What an op may ask of the adapted layer it works for.

    Attributes:
        base_layer: the frozen module.
        site: where it lies among the ranks; None on one process.
        training: whether dropout is on.
        target_name: full name of the module, for messages.
    """

    base_layer: Any
    site: Site | None
    training: bool
    target_name: str

    @property
    def base_weight(self) -> Tensor:
        """What this rank has of the base weight, detached."""

    def add(self, y: Tensor, x: Tensor, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return the output ``y`` with one adapter's part: :meth:`Op.add`, or what its variant makes of it."""

    def in_forward(self, factors: Factors, spec: AdapterSpec) -> Factors:
        """Return the factors of plain LoRA that an adapter, of whichever variant, amounts to in this forward."""

    def get_base_layer(self) -> nn.Module:
        """Return the module of the base model."""


class FactorShapes(NamedTuple):
    """Logical shapes of A and B."""

    a: torch.Size
    b: torch.Size


class Op(ABC):
    """The mathematics of one kind of base layer. Ops hold no state; there is one object of each.

    Attributes:
        kind: PEFT's name of the layer kind, shown in summaries.
        weight_name: the parameter of the base layer that the delta belongs to.
        bias_name: the parameter that the bias of B belongs to.
        lookup: whether A is looked up by index rather than multiplied.
        transposed: whether the base weight is stored ``[in, out]`` (``fan_in_fan_out``).
        children: modules inside the base layer that are adapted along with it.
        tokenwise: whether each token's output depends on that token's input alone, so that a part of them can be left
            out. Otherwise :meth:`add` works on whole rows.
        inward: whether the deltas go into the weights of a call rather than into its output; then a batch of several
            adapters takes a call for each.
        roles_weight: role of each dimension of the base weight (see :mod:`lorica.layout`).
        roles_a: role of each dimension of A.
        roles_b: role of each dimension of B.
        roles_bias: role of each dimension of the bias of B.
        roles_magnitude: role of each dimension of a magnitude of every output; None: the layer can have none.
    """

    kind: ClassVar[str]
    roles_weight: Roles = ("out", "in")
    roles_a: Roles = ("rank", "in")
    roles_b: Roles = ("out", "rank")
    roles_bias: ClassVar[Roles] = ("out",)
    roles_magnitude: Roles | None = None
    weight_name: str = "weight"
    bias_name: ClassVar[str] = "bias"
    lookup: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    children: ClassVar[tuple[str, ...]] = ()
    tokenwise: ClassVar[bool] = False
    inward: ClassVar[bool] = False

    def bias_of(self, base: Any) -> Any:
        """Return the bias of a base layer, or None; Transformer Engine's layers without one have an empty tensor."""
        bias = getattr(base, self.bias_name, None)
        return None if bias is None or not bias.numel() else bias

    @abstractmethod
    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """Return the logical shapes of A and B for rank ``r``."""

    @abstractmethod
    def add(self, y: Tensor, x: Tensor, layer: Host, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return the base layer's output ``y`` plus the adapter's part for the input ``x``.

        On a layer that is cut, all of them are this rank's, and the part is in the parallel state of ``y``.
        """

    def matrices(self, layer: Host, factors: Factors) -> tuple[Tensor, Tensor] | None:
        """Return the ``[r, in]`` and ``[out, r]`` that tokens are multiplied with, one after the other; None where
        :meth:`add` does something else with them."""
        return None

    @abstractmethod
    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return ``left, right`` with ``left · right`` the unscaled delta in the base weight's own orientation,
        flattened to two dimensions.

        Raises:
            TargetError: the delta of this layer has no place in its weight.
        """

    def logical_weight(self, base: Any) -> Tensor:
        """Return the base weight as ``[out, in, …]``."""
        weight = stored_weight(base, self.weight_name)
        return self.orient(weight.dequantize() if isinstance(weight, Packed) else weight.detach())

    def logical_shape(self, base: Any) -> torch.Size:
        """Return the shape of :meth:`logical_weight`; nothing is dequantised for it."""
        shape = stored_weight(base, self.weight_name).shape
        if type(self).orient is Op.orient:
            return shape
        return self.orient(torch.empty(shape, device="meta")).shape

    def orient(self, weight: Tensor) -> Tensor:
        """Return a weight in the base layer's orientation as ``[out, in, …]``."""
        return weight

    def parts(self, base: Any) -> list[tuple[str, int, int]]:
        """Return name, first row and last row of projections that have factors of their own, where there are some."""
        return []

    def windows(
        self, path: str, factor: str, spec: AdapterSpec, base: Any, shape: torch.Size, roles: Roles
    ) -> list[tuple[str, tuple[slice, ...] | None]]:
        """Return the names of a factor tensor in a file, and the part of the logical tensor that each name means.

        Where projections are fused, each has rows of its own of a tensor that goes by the layer's outputs, and an equal
        share of any other.
        """
        return [(f"{path}.{factor}", None)]

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:  # noqa: B027 (a hook, not a duty)
        """Refuse a spec that this layer cannot have.

        Raises:
            TargetError: names the module and the reason.
        """

    def place(self, engines: Engines, name: str, base: nn.Module) -> Site | None:
        """Return where a base layer lies among the ranks; None on one process.

        Raises:
            LayoutError: it is cut in a way that cannot be described.
            TargetError: it is cut in a way that this op cannot work with.
        """
        weight = stored_weight(base, self.weight_name)
        if isinstance(weight, Packed):
            weight.check_whole(name)
        return engines.site(name, base, weight, self.roles_weight)

    def by_rows(
        self, layer: Host, args: tuple[Any, ...], kwargs: dict[str, Any], *, back: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with the rows of the batch in the first dimension of the tensors with rows.

        Args:
            layer: the adapted layer.
            args: of the base layer's forward.
            kwargs: of the base layer's forward.
            back: undo it.
        """
        return args, kwargs

    def output_by_rows(self, layer: Host, output: Any) -> Any:
        """Return an output with the rows in the first dimension, or undo that."""
        return output

    def forward(self, layer: Host, base: Callable[..., Any], running: Running, *args: Any, **kwargs: Any) -> Any:
        """Run ``base``, the base layer's own forward, then add each running adapter's part into its output."""
        x, *rest = args or (kwargs.pop("input" if "input" in kwargs else "x"),)
        x = _autocast(x)
        y = base(x, *rest, **kwargs)
        back = None
        if layer.site is not None:
            x, y, back = localise(layer.site, x, y)
        with autocast_off(x.device.type):
            for factors, spec in running:
                y = layer.add(y, x, factors, spec)
        return y if back is None else back(y)


def _autocast(x: Tensor) -> Tensor:
    # Casting here, once, serves the base product and every adapter; autocast would cast for each product again.
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """Return a context in which dtypes are what the op says: autocast would narrow a float32 output it adds to."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def carried(h_TR: Tensor, sizes: torch.Size, layer: Host) -> Tensor:
    """Return the hidden values of the tokens that B sees: those given, or what they become on their way between ranks.

    Args:
        h_TR: ``[T, r]``, the input seen through A.
        sizes: the leading sizes of the input, whose product is ``T``.
        layer: the adapted layer.
    """
    if layer.site is None or layer.site.carry is None:
        return h_TR
    r = h_TR.shape[1]
    return layer.site.carry(h_TR.view(*sizes, r)).reshape(-1, r)


def add_product(y: Tensor, h: Tensor, layer: Host, factors: Factors, spec: AdapterSpec) -> Tensor:
    """Return ``y + s·(h Bᵀ + bias)`` in one product.

    Args:
        y: ``[…, out]``, the base layer's output.
        h: ``[T, r]``, the input seen through A, ``T`` the product of the leading sizes of ``y``.
        layer: the adapted layer.
        factors: whose ``b`` is ``[out, r]``.
        spec: scale and dropout.
    """
    b_OR = factors.b.to(y.dtype)
    y_TO = y.reshape(-1, b_OR.shape[0])
    bias = share_of_bias(layer, factors, y.dtype)
    if spec.dropout_position == "post" and spec.dropout and layer.training:
        part = drop(F.linear(h, b_OR, bias), spec, "post", layer.site, layer.training)
        return torch.add(y_TO, part, alpha=spec.scaling).view(y.shape)
    if bias is not None:
        y_TO = torch.add(y_TO, bias, alpha=spec.scaling)
    return torch.addmm(y_TO, h, b_OR.t(), alpha=spec.scaling).view(y.shape)


def share_of_bias(layer: Host, factors: Factors, dtype: torch.dtype) -> Tensor | None:
    """Return the bias of B, or this rank's equal share of it where the output is a sum over ranks."""
    if factors.bias is None:
        return None
    bias = factors.bias.to(dtype)
    return bias if layer.site is None else bias / layer.site.layout.shares()


def need_rank_divisible(r: int, groups: int, where: str) -> None:
    """Refuse a rank that the groups of a convolution do not divide."""
    if r % groups:
        raise TargetError(
            f"{where}: a convolution of {groups} groups needs a rank divisible by {groups}, got r={r}; choose another "
            "rank (rank_pattern sets it for this layer alone) or leave the layer out"
        )
