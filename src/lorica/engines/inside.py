"""A way into layers whose method does a collective and a product: something stands in the method's place.

Megatron-Core's and neuronx-distributed's linears hand the collective of their input to the function that multiplies, so
that it can overlap with the product. In an adapted layer it is done before that function, which then gets the input
that it multiplies: the same collectives, and the adapter's part works on the same gathered input.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorica.engines.site import Forward, Opening


class Inside:
    """What stands in for a method of a layer; openings replace its ``product``.

    Attributes:
        method: name of the method.
        module: the layer.
        own: the layer's method, as it was.
        product: the layer's product, without its collectives.
    """

    method: str
    product: Forward

    def __init__(self, module: Any) -> None:
        self.module = module
        self.own = getattr(module, self.method)
        self.kept = self.method in vars(module)
        self.product = self._product

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError


class InsideOpening(Opening):
    """The way into a layer's product. What stands in for the layer's method is there while something is put in.

    Args:
        module: the layer.
        kind: what stands in for its method.
    """

    def __init__(self, module: nn.Module, kind: type[Inside]) -> None:
        self._module, self._kind = module, kind
        super().__init__(self._inside() or kind(module), "product")

    def again(self) -> Opening:
        """Return another one at the same place."""
        return InsideOpening(self._module, self._kind)

    def put(self, forward: Forward) -> None:
        """Let the layer's forward call ``forward`` between its collectives."""
        if (inside := self._inside()) is None:
            inside = self._kind(self._module)
            self._module.__dict__[self._kind.method] = inside
        self._owner = inside
        super().put(forward)

    def close(self) -> None:
        """Take out what was put in; the last one to leave gives the layer its own method back."""
        super().close()
        inside = self._inside()
        if inside is not None and inside.product == inside._product:
            del self._module.__dict__[self._kind.method]
            if inside.kept:
                self._module.__dict__[self._kind.method] = inside.own

    def _inside(self) -> Inside | None:
        found = self._module.__dict__.get(self._kind.method)
        return found if isinstance(found, Inside) else None


__all__ = ["Inside", "InsideOpening"]
