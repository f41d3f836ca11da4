"""HQQ: groups of numbers with a scale and a zero found by half-quadratic splitting (https://mobiusml.github.io/hqq_blog).

Written against hqq 0.2.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorica.storage.base import Quantised


class Hqq(Quantised):
    """``HQQLinear``."""

    fields = ("W_q", "meta")
    chunked = False

    def title(self, base: Any, name: str) -> str:
        """The package's name and the width."""
        return f"HQQ {base.meta['nbits']}-bit"

    def shape(self, base: Any, name: str) -> torch.Size:
        """The packed tensor's is another."""
        return torch.Size(base.meta["shape"])

    def read(self, base: Any, name: str, rows: slice) -> Tensor:
        """Groups can lie across rows, so all are read."""
        values: Tensor = base.dequantize()
        return values[rows]

    def write(self, base: Any, name: str, values: Tensor) -> None:
        """With the width, the group size and the axis that the layer was made with."""
        del base.W_q  # a parameter, in whose place the layer's own code puts a tensor first
        base.W_q = None
        base.quantize(values, **base.quant_config)


HQQ = Hqq()
