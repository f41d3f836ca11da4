"""bitsandbytes: 8-bit rows (LLM.int8(), https://arxiv.org/abs/2208.07339) and 4-bit blocks (QLoRA, 2305.14314).

Written against bitsandbytes 0.50; its CPU backend runs all of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lorica.engines.kinds import is_distributed
from lorica.storage.base import Quantised

_LEVELS = 127.0
#: Parts of a row's largest magnitude that are tried as its scale.
_PARTS = (1.0, 0.998, 0.996, 0.994)


class Int8Rows(Quantised):
    """``Int8Params``: one scale for every row, the largest magnitude in it; ``w = number · scale / 127``."""

    fields = ("weight", "state")

    def holds(self, base: Any, name: str) -> bool:
        """A layer with ``has_fp16_weights`` keeps plain numbers and quantises in every forward."""
        return not getattr(base, name).dtype.is_floating_point

    def title(self, base: Any, name: str) -> str:
        """The package's name and the format's."""
        return "bitsandbytes int8"

    def shape(self, base: Any, name: str) -> torch.Size:
        """That of the numbers."""
        shape: torch.Size = getattr(base, name).shape
        return shape

    def read(self, base: Any, name: str, rows: slice) -> Tensor:
        """Rows are independent."""
        numbers = getattr(base, name).data[rows]
        scales = _scales(base, name).to(numbers.device)[rows]
        values: Tensor = numbers * (scales.view(-1, 1) * (1 / _LEVELS))
        return values

    def write(self, base: Any, name: str, values: Tensor) -> None:
        """In float32; the package's own way goes through float16 first, which overflows at 65504.

        Of each row the best of some scales is taken: at some of which its largest magnitude is clipped.
        """
        scales, numbers = _best_scales(values)
        old = getattr(base, name)
        new = type(old)(numbers, requires_grad=False, has_fp16_weights=False, CB=numbers, SCB=scales)
        setattr(base, name, new)
        if hasattr(base, "state"):
            base.state.reset_grads()  # the next forward takes the numbers from the weight

    def part(self, shadow: Any) -> None:
        """The state object is emptied when a weight is written."""
        if hasattr(shadow, "state"):
            shadow.__dict__["state"] = copy.copy(shadow.state)


def _best_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    largest = values.abs().amax(1, keepdim=True)
    tried = [_at_scale(values, largest * part) for part in _PARTS]
    best = torch.stack([error for error, _, _ in tried]).argmin(0)
    scales, numbers = tried[0][1], tried[0][2]
    for index, (_, other, found) in enumerate(tried):
        scales = torch.where(best == index, other, scales)
        numbers = torch.where(best == index, found, numbers)
    return scales.view(-1), numbers


def _at_scale(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the squared error of each row, its scale and its numbers."""
    steps = torch.where(scales > 0, _LEVELS / scales, 0)
    numbers = (values * steps).round_().clamp_(-_LEVELS, _LEVELS)
    error = torch.addcmul(values, numbers, scales / -_LEVELS).square_().sum(1, keepdim=True)
    return error, scales, numbers.to(torch.int8)


def _scales(base: Any, name: str) -> Tensor:
    # They are with the weight until the first forward, and in the layer's state from then on.
    scales: Tensor | None = getattr(base, name).SCB
    found: Tensor = base.state.SCB if scales is None else scales
    return found


class FourBit(Quantised):
    """``Params4bit``: blocks of 64 numbers in NF4 or FP4, with a scale each, which may be quantised in turn.

    ``fully_shard`` shards the packed numbers; every rank has the scales, in the layer's ``quant_state``.
    """

    sharded = True

    def holds(self, base: Any, name: str) -> bool:
        """Before the layer is on its device, the numbers are plain ones."""
        return _state(base, name) is not None

    def title(self, base: Any, name: str) -> str:
        """The package's name and the format's."""
        return f"bitsandbytes {_state(base, name).quant_type}"

    def shape(self, base: Any, name: str) -> torch.Size:
        """The packed tensor is a column of bytes; the state knows the shape."""
        return torch.Size(_state(base, name).shape)

    def read(self, base: Any, name: str, rows: slice) -> Tensor:
        """In the dtype that the layer computes its weight in; of these rows alone where each begins a block."""
        from bitsandbytes import functional

        numbers, state = _plain(base, name)
        count, columns = state.shape
        start, stop, _ = rows.indices(count)
        size = state.blocksize
        if (start, stop) == (0, count) or columns % size:
            # Also since the package's CPU kernel misreads rows of an odd number of half blocks, in its forward too.
            whole: Tensor = functional.dequantize_4bit(numbers, state)
            return whole[rows]
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        first, last = start * columns, stop * columns
        blocks = functional.QuantState(
            absmax=scales[first // size : last // size].float(),
            shape=torch.Size((stop - start, columns)),
            dtype=state.dtype,
            blocksize=size,
            quant_type=state.quant_type,
        )
        part = numbers.view(torch.uint8).view(-1)[first // 2 : last // 2]
        values: Tensor = functional.dequantize_4bit(part.view(-1, 1), blocks)
        return values

    def write(self, base: Any, name: str, values: Tensor) -> None:
        """With the block size, the format and the double quantisation that the weight has."""
        from bitsandbytes import functional

        old = getattr(base, name)
        state = old.quant_state
        numbers, new = functional.quantize_4bit(
            values.contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
        )
        new.dtype = state.dtype  # what the forward computes in; it was found from more than that
        weight = type(old)(
            numbers,
            requires_grad=False,
            quant_state=new,
            blocksize=state.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=old.module,
            bnb_quantized=True,
        )
        setattr(base, name, weight)
        if hasattr(base, "quant_state"):
            base.quant_state = new


def _state(base: Any, name: str) -> Any:
    state = getattr(getattr(base, name), "quant_state", None)
    return getattr(base, "quant_state", None) if state is None else state


def _plain(base: Any, name: str) -> tuple[Tensor, Any]:
    """Return the numbers, gathered where they are sharded, and their state, in the order that files have."""
    weight, state = getattr(base, name), _state(base, name)
    numbers = weight.full_tensor() if is_distributed(weight) else weight.data
    if not getattr(state, "packing_format_for_cpu", False):
        return numbers, state
    # A forward in inference on some CPUs packed them otherwise, in the layer itself; here in a copy.
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    numbers, state = _convert_weight_packed_for_cpu_inverse(numbers, copy.copy(state))
    return numbers, state


INT8_ROWS, FOUR_BIT = Int8Rows(), FourBit()
