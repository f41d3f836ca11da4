"""peft.utils.warning: the class of lorica's warnings, which are Python's plain ones."""

PeftWarning = UserWarning

__all__ = ["PeftWarning"]
