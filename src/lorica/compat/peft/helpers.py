"""peft.helpers: contexts around adapted models, and targets by condition number."""

from lorica.helpers import (
    DoraCaching,
    MontecloraTrainerMixin,
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
)
from lorica.targets.kappa import KappaTuneSelector, find_kappa_target_modules

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
]
