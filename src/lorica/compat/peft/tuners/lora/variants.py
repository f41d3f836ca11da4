"""peft.tuners.lora.variants: which variant of LoRA an adapter is.

In lorica a variant is an object of :data:`lorica.variants.VARIANTS` and works on every kind of layer. PEFT has a class
for each pair of variant and layer; here these classes say which variant it is (``layer.lora_variant["default"]``), and
compute nothing.
"""

from __future__ import annotations

from typing import Any

from lorica.layers import LoraLayer


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
]
