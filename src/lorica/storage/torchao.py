"""torchao: tensors that are a weight in themselves (https://github.com/pytorch/ao). Written against torchao 0.18.

int8, float8 and the intx grids (int1 to int8, in groups) run on a CPU. The packed int4 tensors are made for kernels of
accelerators, and their package refuses to make them on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorica.storage.base import Quantised, seen_through


class TorchAO(Quantised):
    """A tensor subclass of torchao's."""

    def holds(self, base: Any, name: str) -> bool:
        """Always."""
        return True

    def title(self, base: Any, name: str) -> str:
        """The package's name and the tensor's."""
        return f"torchao {type(getattr(base, name)).__name__}"

    def shape(self, base: Any, name: str) -> torch.Size:
        """The tensor says it."""
        shape: torch.Size = getattr(base, name).shape
        return shape

    def refusal(self, base: Any, name: str) -> str:
        """Of classes whose grid is not known here."""
        if type(getattr(base, name)).__name__ in _MAKERS:
            return ""
        return (
            f"only {', '.join(sorted(_MAKERS))} can be made again here. Merge into the model as it was before it was "
            "quantised (`lorica merge`), and quantise that"
        )

    def read(self, base: Any, name: str, rows: slice) -> Tensor:
        """Of these rows where the tensor can be cut; the tensor is asked, or else seen through its product."""
        weight = getattr(base, name).detach()
        if rows != slice(None):
            try:
                return _values(base, weight[rows])
            except NotImplementedError:
                pass
        return _values(base, weight)[rows]

    def write(self, base: Any, name: str, values: Tensor) -> None:
        """In the tensor's own grid: as many scales, of the same kind."""
        old = getattr(base, name)
        make = _MAKERS[type(old).__name__]
        setattr(base, name, nn.Parameter(make(old, values.to(old.dtype)), requires_grad=False))


def _values(base: Any, weight: Any) -> Tensor:
    try:
        values: Tensor = weight.dequantize()
    except (NotImplementedError, AttributeError):
        if weight.shape != base.weight.shape:
            raise NotImplementedError(f"{type(weight).__name__} cannot be read in parts") from None
        values = seen_through(base, weight.shape[1], weight.dtype, weight.device)
    return values


def _granularity(block: Any, shape: torch.Size) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    sizes = [int(size) for size in block]
    if sizes == list(shape):
        return PerTensor()
    return PerRow() if sizes[-1] == shape[-1] else PerGroup(sizes[-1])


def _int8(old: Any, values: Tensor) -> Tensor:
    made: Tensor = type(old).from_hp(
        values,
        _granularity(old.block_size, values.shape),
        mapping_type=_mapping(old),
        **_those(old, "act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"),
    )
    return made


def _float8(old: Any, values: Tensor) -> Tensor:
    made: Tensor = type(old).from_hp(
        values,
        old.qdata.dtype,
        _granularity(old.block_size, values.shape),
        **_those(old, "mm_config", "kernel_preference", "act_quant_kwargs"),
    )
    return made


def _intx(old: Any, values: Tensor) -> Tensor:
    made: Tensor = type(old).from_hp(
        values,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=_mapping(old),
        **_those(old, "activation_quantization"),
    )
    return made


def _mapping(old: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    centred = old.zero_point is None or not old.zero_point.any()
    return MappingType.SYMMETRIC if centred else MappingType.ASYMMETRIC


def _those(old: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(old, name) for name in names if hasattr(old, name)}


_MAKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
}

TORCHAO = TorchAO()
