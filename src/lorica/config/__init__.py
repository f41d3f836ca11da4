"""What the user asks for: configurations, their JSON form, and the frozen spec each target gets from them."""

from lorica.config.base import CONFIG_NAME, PeftConfig, PeftType, TaskType
from lorica.config.lora import LoraConfig, LoraRuntimeConfig
from lorica.config.spec import AdapterSpec

__all__ = ["CONFIG_NAME", "AdapterSpec", "LoraConfig", "LoraRuntimeConfig", "PeftConfig", "PeftType", "TaskType"]
