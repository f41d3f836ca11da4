"""peft.utils.peft_types: the method and the task."""

from lorica.config import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
