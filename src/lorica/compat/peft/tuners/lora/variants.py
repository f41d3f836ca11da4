"""peft.tuners.lora.variants: which variant of LoRA an adapter is.

In lorica a variant is an object of :data:`lorica.variants.VARIANTS` and works on every kind of layer. PEFT has a class
for each pair of variant and layer; here these classes say which variant it is (``layer.lora_variant["default"]``), and
compute nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.layers import LoraLayer
from lorica.routing.offsets import (
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
)


class LoraVariant:
    """The variant of an adapter on one kind of layer."""

    def supports_lora_conversion(self) -> bool:
        """Whether what it does can be approximated by plain LoRA: as a change of the base weight, so can all."""
        return True


class DoraLinearVariant(LoraVariant):
    """DoRA on a linear layer."""


class DoraEmbeddingVariant(DoraLinearVariant):
    """DoRA on an embedding."""


class DoraConv1dVariant(LoraVariant):
    """DoRA on a one-dimensional convolution."""


class DoraConv2dVariant(LoraVariant):
    """DoRA on a two-dimensional convolution."""


class DoraConv3dVariant(LoraVariant):
    """DoRA on a three-dimensional convolution."""


class ALoraLinearVariant(LoraVariant):
    """Activated LoRA."""


class ArrowLinearVariant(LoraVariant):
    """Arrow routing."""


class BdLoraLinearVariant(LoraVariant):
    """Block-diagonal LoRA."""


class KasaLinearVariant(LoraVariant):
    """KaSA."""


class MiCALinearVariant(LoraVariant):
    """MiCA on a linear layer."""


class MiCAEmbeddingVariant(LoraVariant):
    """MiCA on an embedding."""


class MontecloraLinearVariant(LoraVariant):
    """MonteCLoRA."""


class QALoraLinearVariant(LoraVariant):
    """QA-LoRA."""


class VeloraLinearVariant(LoraVariant):
    """VeLoRA."""


class BlockDiagonalLinear(nn.Module):
    """A linear layer without bias whose weight is block-diagonal. It is not what lorica's BD-LoRA runs on.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        nblocks: how many blocks there are; it divides both.
        init_zero: start with zeros.
        dtype: of the weight.
        device: of the weight.

    Raises:
        ValueError: a length is not divisible.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(
                f"self.in_features={in_features} or self.out_features={out_features} not divisible by {nblocks}"
            )
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // nblocks, dtype=dtype, device=device))
        if init_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, ``[…, out]``."""
        pieces = zip(x.chunk(self.nblocks, -1), self.weight.chunk(self.nblocks), strict=True)
        return torch.cat([F.linear(piece, block) for piece, block in pieces], -1)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """Return the weight as ``[out, in]``, zeros outside of the blocks."""
        whole: Tensor = torch.block_diag(*self.weight.chunk(self.nblocks))  # type: ignore[no-untyped-call]
        return whole


_OF_LAYER: dict[tuple[str, str], type[LoraVariant]] = {
    ("use_dora", "Linear"): DoraLinearVariant,
    ("use_dora", "Embedding"): DoraEmbeddingVariant,
    ("use_dora", "Conv1d"): DoraConv1dVariant,
    ("use_dora", "Conv2d"): DoraConv2dVariant,
    ("use_dora", "Conv3d"): DoraConv3dVariant,
    ("alora_invocation_tokens", ""): ALoraLinearVariant,
    ("arrow_config", ""): ArrowLinearVariant,
    ("use_bdlora", ""): BdLoraLinearVariant,
    ("kasa_config", ""): KasaLinearVariant,
    ("monteclora_config", ""): MontecloraLinearVariant,
    ("use_qalora", ""): QALoraLinearVariant,
    ("velora_config", ""): VeloraLinearVariant,
}


def variants_of(layer: LoraLayer) -> dict[str, LoraVariant]:
    """Return an object of PEFT's class for each adapter of a layer that is not plain LoRA."""
    found: dict[str, LoraVariant] = {}
    for name, spec in layer.specs.items():
        cls: Any = _OF_LAYER.get((spec.variant, layer.op.kind)) or _OF_LAYER.get((spec.variant, ""))
        if cls is not None:
            found[name] = cls()
    return found


__all__ = [
    "ALoraLinearVariant",
    "ArrowLinearVariant",
    "BdLoraLinearVariant",
    "BlockDiagonalLinear",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "KasaLinearVariant",
    "LoraVariant",
    "MiCAEmbeddingVariant",
    "MiCALinearVariant",
    "MontecloraLinearVariant",
    "QALoraLinearVariant",
    "VeloraLinearVariant",
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
]
