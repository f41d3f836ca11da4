"""Hidden values that travel (``a2a_experimental``): the way into layers around their collectives, not between them.

Under sequence parallelism a row-parallel layer leaves each rank its tokens of a sum, and a column-parallel one gathers
them. There the ``r`` hidden values of each token can travel between A and B: ``[tokens, batch, r]`` in one collective.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lorica.engines.inside import Inside, InsideOpening
from lorica.engines.native.collectives import sequence_gather, sequence_swap
from lorica.engines.site import Axis, Site
from lorica.errors import LayoutError

#: The dimension of the tokens in Megatron's activations.
TOKENS = 0


class _Around(Inside):
    """In the place of ``forward`` of a linear layer, which returns its bias beside its output."""

    method = "forward"

    def __call__(self, input_: Tensor, **options: Any) -> tuple[Tensor, Any]:
        if options.get("runtime_gather_output"):
            raise LayoutError("a2a_experimental: this layer gathers its output, which its adapter's part is no part of")
        output = self.product(input_, **options)
        return output, self.bias

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        output: Tensor
        output, self.bias = self.own(x, **options)
        return output


def across(module: Any, site: Site, axis: Axis) -> Site | None:
    """Return the place of a layer where its tokens are this rank's, if it has one.

    Args:
        module: a linear layer of Megatron's.
        site: its place between its collectives.
        axis: over which it is cut.
    """
    column = site.layout.cut_of("out") is not None
    if axis.size == 1 or not getattr(module, "sequence_parallel", False):
        return None
    if getattr(module, "explicit_expert_comm", False):  # of experts: the dispatcher gathers and reduces, not they
        return None
    if column and module.gather_output:
        return None
    carry = partial(_gather, axis) if column else partial(sequence_swap, axis=axis, dim=TOKENS)
    layout = replace(site.layout, sequence=(*site.layout.sequence, axis.name))
    return replace(site, layout=layout, opening=InsideOpening(module, _Around), carry=carry)


def _gather(axis: Axis, h: Tensor) -> Tensor:
    return sequence_gather(h, axis, TOKENS, [h.shape[TOKENS]] * axis.size)


__all__ = ["across"]
