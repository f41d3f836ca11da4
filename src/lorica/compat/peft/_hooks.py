"""Which of peft's constructors give way to ours, and when."""

from __future__ import annotations

from typing import Any

from lorica.compat.peft import peft_model
from lorica.compat.peft._library import foreign, give_way
from lorica.compat.peft.config import PeftConfig
from lorica.compat.peft.tuners.lora.model import LoraModel

_all = False


def take_over(on: bool = True) -> None:
    """Let peft's own ``LoraConfig`` lead to lorica too, in what calls peft itself.

    Then ``model.load_adapter(path)`` and ``AutoModel.from_pretrained(path_of_an_adapter)`` of transformers, TRL's
    command line, and any code that still imports peft, adapt by lorica wherever the method is LoRA. Models that exist
    already stay what they are. Without this call, only configurations of this package do.

    Args:
        on: whether it does; False gives it back.

    Raises:
        ImportError: peft is not installed.
    """
    global _all
    if foreign("PeftModel") is None:
        raise ImportError("take_over: peft is not installed, so nothing calls it")
    _all = on


def _is_ours(config: Any) -> bool:
    return isinstance(config, PeftConfig) or (_all and type(config) is foreign("LoraConfig"))


def _choose_model(cls: type, config: Any) -> type:
    own: type | None = getattr(peft_model, cls.__name__, None)
    chosen = _is_ours(config) and own is not None and issubclass(own, cls)
    return own if chosen and own is not None else cls


def _choose_tuner(cls: type, config: Any) -> type:
    return LoraModel if _is_ours(config) and cls is foreign("LoraModel") else cls


give_way("PeftModel", _choose_model)
give_way("LoraModel", _choose_tuner)

__all__ = ["take_over"]
