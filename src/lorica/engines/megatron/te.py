"""Megatron's linears over Transformer Engine, known by the names of their classes; that package is never imported here.

Transformer Engine does the collectives of a layer inside its own forward. While an adapter is on such a layer its
forward computes as if the layer were alone, and the same collectives are done around it by Megatron's own functions; so
the adapter's part works between them, as everywhere. What is fused with the layer, its normalisation, stays so: A sees
what comes out of it. Overlapping communication with products (``tp_comm_overlap``) is what this gives up, and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lorica.engines.inside import Inside, InsideOpening
from lorica.engines.megatron.groups import TENSOR, axis_of
from lorica.engines.site import Axis
from lorica.errors import LayoutError

_PLACE = "megatron.core.extensions.transformer_engine."
TE_COLUMN, TE_NORM_COLUMN, TE_ROW = (
    _PLACE + name for name in ("TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TERowParallelLinear")
)
TE_LINEARS = (TE_COLUMN, TE_NORM_COLUMN, TE_ROW)


class _Linear(Inside):
    """In the place of ``forward`` of a linear layer."""

    method = "forward"
    bias: Any = None

    def __call__(self, x: Tensor, **options: Any) -> tuple[Tensor, Any]:
        from megatron.core.tensor_parallel import mappings

        module = self.module
        group, tokens = module._tp_group, module.sequence_parallel
        if module.parallel_mode == "row":
            y = self.product(x, **options)
            scatter, reduce = (
                mappings.reduce_scatter_to_sequence_parallel_region,
                mappings.reduce_from_tensor_model_parallel_region,
            )
            return (scatter if tokens else reduce)(y, group=group), self.bias
        if tokens:
            x = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
        else:
            x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        return self._column(x, **options), self.bias

    def _column(self, x: Tensor, **options: Any) -> Tensor:
        y: Tensor = self.product(x, **options)
        return y

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        y: Tensor
        with _alone(self.module):
            y, self.bias = self.own(x, **options)
        return y


class _NormLinear(_Linear):
    """The same where the layer begins with a normalisation: what comes out of it is the input of the product."""

    def _column(self, x: Tensor, **options: Any) -> Tensor:
        module = self.module
        before, module.return_layernorm_output = module.return_layernorm_output, True
        try:
            with _alone(module):
                found = self.own(x, **options)
        finally:
            module.return_layernorm_output = before
        # The output and the normalised input in a pair, beside no bias; or all three.
        (self._made, normed), self.bias = found if len(found) == 2 else ((found[0], found[2]), found[1])
        y: Tensor = self.product(normed)
        return y

    _made: Tensor

    def _product(self, x: Tensor, **options: Any) -> Tensor:
        return self._made


@contextmanager
def _alone(module: Any) -> Iterator[None]:
    """Let a layer compute as if there were no other ranks."""
    names = ("parallel_mode", "sequence_parallel", "tp_size")
    before = [getattr(module, name) for name in names]
    module.parallel_mode, module.sequence_parallel, module.tp_size = None, False, 1
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(module, name, value)


def opening(module: Any, kind: str) -> InsideOpening:
    """Return the way into a layer's product.

    Raises:
        LayoutError: it overlaps its collectives with its product, adds its bias to a sum of ranks itself, or is an
            expert's.
    """
    if getattr(module.config, "tp_comm_overlap", False):
        raise LayoutError(
            "with tp_comm_overlap the collectives are inside the products; turn it off to adapt the layer"
        )
    if module.parallel_mode not in ("column", "row"):
        raise LayoutError("a layer of an expert over Transformer Engine is adapted in TEGroupedMLP only")
    if kind == TE_ROW and module.use_bias and not module.te_return_bias:
        raise LayoutError("it adds its bias to what it has reduced; build it with skip_bias_add=True to adapt it")
    return InsideOpening(module, _NormLinear if kind == TE_NORM_COLUMN else _Linear)


def te_axis(module: Any) -> Axis:
    """Return the tensor-parallel axis of a layer."""
    return axis_of(TENSOR, getattr(module, "_tp_group", None))


def logical_sizes(module: Any) -> tuple[int, int]:
    """Return how many outputs and inputs the whole of a linear layer has, over Transformer Engine or not."""
    if hasattr(module, "output_size"):
        return module.output_size, module.input_size
    out, into, ranks = module.out_features, module.in_features, te_axis(module).size
    return (out * ranks, into) if module.parallel_mode == "column" else (out, into * ranks)


__all__ = ["TE_COLUMN", "TE_LINEARS", "TE_NORM_COLUMN", "TE_ROW", "logical_sizes", "opening", "te_axis"]
