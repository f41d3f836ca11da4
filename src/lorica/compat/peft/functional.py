"""peft.functional: for models that hold adapters without a wrapper."""

from lorica.checkpoint.loading import set_peft_model_state_dict
from lorica.checkpoint.saving import get_peft_model_state_dict
from lorica.compat.peft.mapping import inject_adapter_in_model
from lorica.compat.peft.tuners.tuners_utils import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
