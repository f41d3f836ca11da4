"""peft.utils.error: the errors that say a configuration or an adapter does not fit."""

from lorica.errors import LoricaError as PeftError
from lorica.errors import TargetError as NoMatchingPeftModuleError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
