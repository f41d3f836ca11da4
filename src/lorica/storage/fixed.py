"""Forms that are made once, with calibration data or by a search, and only read afterwards.

GPTQ and AWQ (written against gptqmodel 7.7, whose torch kernels run on a CPU), AQLM (aqlm 1.1), EETQ and Intel's
neural compressor. Rounding a changed weight to the grid that was fitted to another would give away what the
calibration was for, and PEFT does not merge into them either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorica.storage.base import Quantised, seen_through


class Fixed(Quantised):
    """A linear layer whose weight can be read and not written.

    Args:
        label: the form's name.
        field: a tensor of the layer that says where it is.
    """

    chunked = False

    def __init__(self, label: str, field: str) -> None:
        self.label = label
        self.fields = (field,)  # type: ignore[misc]

    def refusal(self, base: Any, name: str) -> str:
        """They never can."""
        return (
            "its numbers were fitted to the weight as it was, and cannot be fitted again here. Merge into the model as "
            "it was before it was quantised (`lorica merge`), and quantise that"
        )

    def title(self, base: Any, name: str) -> str:
        """The form's name."""
        return self.label

    def read(self, base: Any, name: str, rows: slice) -> Tensor:
        """From the layer's own ``dequantize_weight`` (``[in, out]``) where it has one, else through its product."""
        own = getattr(base, "dequantize_weight", None)
        if own is not None:
            values: Tensor = own().T
        else:
            values = seen_through(base, base.in_features, self._dtype(base), getattr(base, self.fields[0]).device)
        return values.detach()[rows]

    def _dtype(self, base: Any) -> torch.dtype:
        for name in ("scales", "weight_scales", "codebooks", "bias", self.fields[0]):
            tensor = getattr(base, name, None)
            if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                return tensor.dtype
        return torch.get_default_dtype()


class Aqlm(Fixed):
    """``QuantizedLinear``: every block of the weight is a sum of entries of codebooks (https://arxiv.org/abs/2401.06118)."""

    def read(self, base: Any, name: str, rows: slice) -> Tensor:
        """``W = s·Σ_c codebook_c[code_c]``; the layer's own CPU kernel adds in threads that overwrite each other."""
        codes, books = base.codes.detach(), base.codebooks.detach()
        if base.gemv_op is not None and not codes.is_cuda and base.codebook_size == 256:
            codes = codes.permute(1, 0, 2)  # its first forward turned them round
        index = codes.to(torch.int64) % base.codebook_size
        blocks = sum(books[c][index[..., c]] for c in range(base.num_codebooks)) * base.scales.detach()
        values: Tensor = blocks.permute(0, 2, 1, 3).reshape(base.out_features, base.in_features)
        return values[rows]


GPTQ = Fixed("GPTQ", "qweight")
AWQ = Fixed("AWQ", "qweight")
AQLM = Aqlm("AQLM", "codes")
EETQ = Fixed("EETQ int8", "weight")
INC = Fixed("Intel neural compressor fp8", "weight")
