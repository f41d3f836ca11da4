"""What a variant of LoRA answers. Plain LoRA answers too."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.init import Factors
from lorica.ops import Op
from lorica.ops.base import Host


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

    def unmerged_weight(self) -> Tensor:
        """Return what this rank has of the base weight, without the adapters that are merged into it."""

    def share_at_rest(self) -> tuple[slice, slice]:
        """Return which rows and columns of this rank's delta belong to the weight that it has now."""


class Variant:
    """Plain LoRA: ``y + s·B·A·x`` and ``W + s·B·A``.

    A variant overrides what it does otherwise. Variants hold no state; there is one object of each.

    Attributes:
        across: whether its part can be added outside of the base layer's collectives, where the input is not yet what
            the base weight is multiplied with (``a2a_experimental``).
    """

    across: ClassVar[bool] = True

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """Refuse a layer or a spec that this variant cannot have.

        Raises:
            TargetError: names the module and the reason.
        """

    def magnitude_shape(self, op: Op, outputs: int) -> torch.Size | None:
        """Return the shape of the magnitude for this rank's ``outputs``; None: the variant has none."""
        return None

    def magnitude(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return the magnitude to start with; the base weight and the factors are as training finds them."""
        raise NotImplementedError

    def add(self, y: Tensor, x: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return the output ``y`` with the adapter's part for the input ``x``, in the parallel state of ``y``."""
        return layer.op.add(y, x, layer, factors, spec)

    def gain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor | None:
        """Return what multiplies ``W + s·B·A``, one number for every output that this rank keeps; None: nothing."""
        return None
