"""The mathematics of low-rank adaptation, once for each kind of base layer, and the registry that finds it."""

from __future__ import annotations

from torch import nn

from lorica.engines import neuronx
from lorica.engines.megatron.engine import COLUMN, EMBEDDING, EXPERT_COLUMN, EXPERT_ROW, ROUTER, ROW, TE_LINEARS
from lorica.engines.native import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from lorica.engines.registry import layout_of
from lorica.ops.attention import Attention
from lorica.ops.base import FactorShapes, Op
from lorica.ops.conv import Conv
from lorica.ops.embedding import Embedding
from lorica.ops.experts import experts_op, matrix_op
from lorica.ops.fused import FusedLinear, NotFused, OneLinear, part_names
from lorica.ops.linear import Beside, Linear, Router, TransposedLinear
from lorica.storage import LINEARS

#: Class of a base layer, or its full name where lorica does not depend on its package → op.
OPS: dict[type[nn.Module] | str, Op] = {
    nn.Linear: Linear(),
    nn.Embedding: Embedding(),
    nn.Conv1d: Conv(1),
    nn.Conv2d: Conv(2),
    nn.Conv3d: Conv(3),
    nn.MultiheadAttention: Attention(),
    "transformers.pytorch_utils.Conv1D": TransposedLinear(),
    ColumnParallelLinear: Linear(),
    RowParallelLinear: Linear(),
    ParallelEmbedding: Embedding(),
    **dict.fromkeys(LINEARS, Linear()),
    COLUMN: Linear(),
    ROW: Linear(),
    **dict.fromkeys(TE_LINEARS, Linear()),
    EMBEDDING: Embedding(),
    ROUTER: Router(),
    EXPERT_COLUMN: Linear(),
    EXPERT_ROW: Linear(),
    neuronx.COLUMN: Linear(),
    neuronx.ROW: Linear(),
    neuronx.EMBEDDING: Embedding(),
    neuronx.QKV: NotFused(neuronx.QKV_NEEDS),
    "transformer_engine.pytorch.module.linear.Linear": Linear(),
    "transformer_engine.pytorch.module.layernorm_linear.LayerNormLinear": Beside(),
}
#: Projections that are fused in one weight: the op for factors of their own, and for one pair.
_FUSED: tuple[Op, Op] = (FusedLinear(), OneLinear())
#: The same for classes whose weight has another name.
_FUSED_ELSEWHERE: dict[type[nn.Module] | str, tuple[Op, Op]] = {
    neuronx.QKV: (FusedLinear(neuronx.QKV_WEIGHT), OneLinear(neuronx.QKV_WEIGHT)),
}


def op_of(module: nn.Module, *, fused_as_one: bool = False) -> Op | None:
    """Return the op for a base layer or None; subclasses are found by their bases.

    Args:
        module: the base layer.
        fused_as_one: whether projections that are fused in it are to have one pair of factors.
    """
    layout = layout_of(module)
    if layout is not None and layout.parts:
        fused = next((_FUSED_ELSEWHERE[k] for k in _keys_of(type(module)) if k in _FUSED_ELSEWHERE), _FUSED)
        return fused[fused_as_one]
    for key in _keys_of(type(module)):
        if key in OPS:
            return OPS[key]
    return None


def _keys_of(cls: type[nn.Module]) -> list[type[nn.Module] | str]:
    """Return what a class of base layers may be called in the registry: it, its full name, and those of its bases."""
    if cls not in _KEYS:
        _KEYS[cls] = [key for base in cls.__mro__ for key in (base, f"{base.__module__}.{base.__qualname__}")]
    return _KEYS[cls]


_KEYS: dict[type, list[type[nn.Module] | str]] = {}


def op_of_parameter(module: nn.Module, name: str, *, shared: bool = False) -> Op | None:
    """Return the op for one parameter of a module, found by its dimensions, or None.

    The weight of a linear layer is adapted by the layer's own; other layers are to be named themselves.

    Args:
        module: the module that holds it.
        name: the parameter.
        shared: whether stacked experts share one adapter.
    """
    parameter = module._parameters.get(name)
    if parameter is None or parameter.dim() not in (2, 3):
        return None
    if (op := op_of(module)) is not None:
        return op if op.weight_name == name and op.kind == "Linear" and not op.transposed else None
    if parameter.dim() == 2:
        return matrix_op(name)
    return experts_op(name, turned=bool(getattr(module, "is_transposed", False)), shared=shared)


def supported_layers() -> list[str]:
    """Return the names of the base layers that can be adapted."""
    return [key if isinstance(key, str) else f"torch.nn.{key.__name__}" for key in OPS]


__all__ = ["OPS", "FactorShapes", "Op", "op_of", "op_of_parameter", "part_names", "supported_layers"]
