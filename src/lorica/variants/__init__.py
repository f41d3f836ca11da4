"""What an adapter may make of its factors other than ``y + s·B·A·x``: a registry by field of the configuration."""

from __future__ import annotations

from typing import Any

from lorica.variants.alora import Alora
from lorica.variants.arrow import Arrow
from lorica.variants.base import Extra, Hosting, Variant
from lorica.variants.bdlora import BdLora
from lorica.variants.dora import Dora
from lorica.variants.kasa import Kasa
from lorica.variants.monteclora import Monteclora
from lorica.variants.qalora import QaLora
from lorica.variants.velora import Velora

#: The field of ``LoraConfig`` that turns a variant on → the variant. Empty: plain LoRA.
VARIANTS: dict[str, Variant] = {
    "": Variant(),
    "use_dora": Dora(),
    "kasa_config": Kasa(),
    "use_bdlora": BdLora(),
    "use_qalora": QaLora(),
    "velora_config": Velora(),
    "monteclora_config": Monteclora(),
    "alora_invocation_tokens": Alora(),
    "arrow_config": Arrow(),
}


def variant_of(config: Any) -> str:
    """Return the key of the variant that a configuration asks for."""
    return next((field for field in VARIANTS if field and getattr(config, field)), "")


__all__ = ["VARIANTS", "Extra", "Hosting", "Variant", "variant_of"]
