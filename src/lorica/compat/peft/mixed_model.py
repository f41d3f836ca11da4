"""peft.mixed_model: adapters of several methods on one model, of which lorica has one."""

from __future__ import annotations

from typing import Any

from lorica.compat.peft.peft_model import PeftModel


class PeftMixedModel(PeftModel):
    """Adapters of several methods on one model. There is LoRA only, of which any :class:`PeftModel` holds several.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "mixed=True: lorica adapts by LoRA only, so there is nothing to mix; PeftModel activates several LoRA "
            "adapters at once with base_model.set_adapter([...])"
        )


__all__ = ["PeftMixedModel"]
