"""peft.utils.transformers_weight_conversion: what transformers 5 changed in names of weights, for adapters.

These functions edit transformers' own description of such changes and touch no adapted model, so they are peft's,
where it is installed. lorica needs none of them: it reads the form of an adapter's file from the file.
"""

from __future__ import annotations

import importlib
from typing import Any

from lorica.errors import require_extra


def _theirs(name: str) -> Any:
    require_extra("peft", "bench")
    return getattr(importlib.import_module("peft.utils.transformers_weight_conversion"), name)


def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> Any:
    """Return transformers' conversions of weights, as they apply to the factors of an adapter.

    Raises:
        MissingExtraError: peft is not installed.
    """
    return _theirs("build_peft_weight_mapping")(weight_conversions, adapter_name, peft_config=peft_config)


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: Any) -> None:
    """Change, in place, the targets of a configuration that was written for an older transformers.

    Raises:
        MissingExtraError: peft is not installed.
    """
    _theirs("convert_peft_config_for_transformers")(peft_config, model, conversions)


def convert_peft_adapter_state_dict_for_transformers(
    model: Any, peft_config: Any, adapter_state_dict: dict[str, Any], adapter_name: str = "default"
) -> dict[str, Any]:
    """Return an adapter's tensors, written with an older transformers, in the form of the installed one.

    Raises:
        MissingExtraError: peft is not installed.
    """
    convert = _theirs("convert_peft_adapter_state_dict_for_transformers")
    result: dict[str, Any] = convert(model, peft_config, adapter_state_dict, adapter_name=adapter_name)
    return result


__all__ = [
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]
