"""What every op answers: shapes of the factors, the forward with them, and the delta as a product of two matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.errors import TargetError
from lorica.init import Factors

Running = Iterable[tuple[Factors, AdapterSpec]]


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
    """

    kind: ClassVar[str]
    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"
    lookup: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    children: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """Return the logical shapes of A and B for rank ``r``."""

    @abstractmethod
    def add(self, y: Tensor, x: Tensor, base: Any, factors: Factors, spec: AdapterSpec, training: bool) -> Tensor:
        """Return the base layer's output ``y`` plus the adapter's part for the input ``x``."""

    @abstractmethod
    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return ``left, right`` with ``left · right`` the unscaled delta in the base weight's own orientation,
        flattened to two dimensions.

        Raises:
            TargetError: the delta of this layer has no place in its weight.
        """

    def logical_weight(self, base: Any) -> Tensor:
        """Return the base weight as ``[out, in, …]``."""
        weight: Tensor = getattr(base, self.weight_name)
        return weight.detach()

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:  # noqa: B027 (a hook, not a duty)
        """Refuse a spec that this layer cannot have.

        Raises:
            TargetError: names the module and the reason.
        """

    def forward(self, layer: nn.Module, base: Any, running: Running, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer, then add each running adapter's part into its output."""
        x, *rest = args or (kwargs.pop("input" if "input" in kwargs else "x"),)
        x = _autocast(x)
        y = base(x, *rest, **kwargs)
        with autocast_off(x.device.type):
            for factors, spec in running:
                y = self.add(y, x, base, factors, spec, layer.training)
        return y


def _autocast(x: Tensor) -> Tensor:
    # Casting here, once, serves the base product and every adapter; autocast would cast for each product again.
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """Return a context in which dtypes are what the op says: autocast would narrow a float32 output it adds to."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def drop(x: Tensor, spec: AdapterSpec, position: str, training: bool) -> Tensor:
    """Apply the adapter's dropout to ``x`` if it belongs at ``position``."""
    if spec.dropout and training and spec.dropout_position == position:
        return F.dropout(x, spec.dropout)
    return x


def add_product(y: Tensor, h: Tensor, factors: Factors, spec: AdapterSpec, training: bool) -> Tensor:
    """Return ``y + s·(h Bᵀ + bias)`` in one product.

    Args:
        y: ``[…, out]``, the base layer's output.
        h: ``[T, r]``, the input seen through A, ``T`` the product of the leading sizes of ``y``.
        factors: whose ``b`` is ``[out, r]``.
        spec: scale and dropout.
        training: whether dropout is on.
    """
    b_OR = factors.b.to(y.dtype)
    y_TO = y.reshape(-1, b_OR.shape[0])
    if spec.dropout_position == "post" and spec.dropout and training:
        part = F.linear(h, b_OR, None if factors.bias is None else factors.bias.to(y.dtype))
        return torch.add(y_TO, F.dropout(part, spec.dropout), alpha=spec.scaling).view(y.shape)
    if factors.bias is not None:
        y_TO = torch.add(y_TO, factors.bias.to(y.dtype), alpha=spec.scaling)
    return torch.addmm(y_TO, h, b_OR.t(), alpha=spec.scaling).view(y.shape)


def need_rank_divisible(r: int, groups: int, where: str) -> None:
    """Refuse a rank that the groups of a convolution do not divide."""
    if r % groups:
        raise TargetError(
            f"{where}: a convolution of {groups} groups needs a rank divisible by {groups}, got r={r}; choose another "
            "rank (rank_pattern sets it for this layer alone) or leave the layer out"
        )
