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
from lorica.engines.megatron.groups import TENSOR
from lorica.engines.site import Axis
from lorica.errors import LayoutError

_PLACE = "megatron.core.extensions.transformer_engine."
TE_COLUMN, TE_NORM_COLUMN, TE_ROW = (
    _PLACE + name for name in ("TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TERowParallelLinear")
)
#: What the others are derived from: on its own it is whole on every rank, as the down-projections of latent attention.
TE_WHOLE = _PLACE + "TELinear"
TE_LINEARS = (TE_COLUMN, TE_NORM_COLUMN, TE_ROW, TE_WHOLE)
#: Transformer Engine's own layers, which nothing of Megatron's stands around.
TE_BARE = (
    "transformer_engine.pytorch.module.linear.Linear",
    "transformer_engine.pytorch.module.layernorm_linear.LayerNormLinear",
)


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
        if module.parallel_mode is None:
            return self.product(x, **options), self.bias
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
            with _summed_norm(module), _alone(module):
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


@contextmanager
def _summed_norm(module: Any) -> Iterator[None]:
    """Let the gradients of a layer's normalisation be summed over the ranks of its group.

    Alone, a rank works out the share that its own outputs have. On a divided sequence Megatron sums the shares; on a
    whole one it does not, since the layer itself sums what reaches the normalisation.
    """
    from megatron.core.tensor_parallel import mappings

    names = () if module.sequence_parallel else _NORM
    trained = {name: parameter for name in names if (parameter := module._parameters.get(name)) is not None}
    trained = {name: parameter for name, parameter in trained.items() if parameter.requires_grad}
    for name, parameter in trained.items():  # no parameters, but found before them while the forward runs
        module.__dict__[name] = mappings.copy_to_tensor_model_parallel_region(parameter, group=module._tp_group)
    try:
        yield
    finally:
        for name in trained:
            del module.__dict__[name]


_NORM = ("layer_norm_weight", "layer_norm_bias")


def opening(module: Any, kind: str) -> InsideOpening:
    """Return the way into a layer's product.

    Raises:
        LayoutError: it overlaps its collectives with its product, adds its bias to a sum of ranks itself, is an
            expert's, or does what it does over ranks without Megatron.
    """
    if kind in TE_BARE:
        raise LayoutError(
            "this is Transformer Engine's own class, divided over ranks or with return_bias=True: to adapt it build it "
            "on one rank with return_bias=False, or as Megatron's TEColumnParallelLinear, TERowParallelLinear or "
            "TELayerNormColumnParallelLinear"
        )
    if kind != TE_WHOLE and getattr(module.config, "tp_comm_overlap", False):
        raise LayoutError(
            "with tp_comm_overlap the collectives are inside the products; turn it off to adapt the layer"
        )
    if module.parallel_mode is None and kind != TE_WHOLE:
        raise LayoutError(
            "a layer of an expert over Transformer Engine is adapted in TEGroupedMLP only: build the experts with "
            "moe_grouped_gemm=True, or over Megatron's own linears"
        )
    if kind == TE_ROW and module.use_bias and not module.te_return_bias:
        raise LayoutError("it adds its bias to what it has reduced; build it with skip_bias_add=True to adapt it")
    return InsideOpening(module, _NormLinear if kind == TE_NORM_COLUMN else _Linear)


def te_axis(module: Any) -> Axis:
    """Return the tensor-parallel axis of a layer."""
    return Axis.of_group(TENSOR, getattr(module, "_tp_group", None))


def logical_sizes(module: Any) -> tuple[int, int]:
    """Return how many outputs and inputs the whole of a linear layer has, over Transformer Engine or not."""
    if hasattr(module, "output_size"):
        return module.output_size, module.input_size
    out, into, ranks = module.out_features, module.in_features, te_axis(module).size
    times = {"column": (ranks, 1), "row": (1, ranks)}.get(module.parallel_mode, (1, 1))
    return out * times[0], into * times[1]


def is_alone(module: Any) -> bool:
    """Whether one of Transformer Engine's own layers is on one rank and returns its output alone, as ``nn.Linear``."""
    return getattr(module, "tp_size", 1) == 1 and not getattr(module, "return_bias", False)


__all__ = [
    "TE_BARE",
    "TE_COLUMN",
    "TE_LINEARS",
    "TE_NORM_COLUMN",
    "TE_ROW",
    "TE_WHOLE",
    "is_alone",
    "logical_sizes",
    "opening",
    "te_axis",
]
