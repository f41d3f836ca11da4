"""peft.config: the base of all configurations."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import Any

from lorica import config as core
from lorica.compat.peft._library import foreign
from lorica.config import CONFIG_NAME, PeftType, TaskType
from lorica.errors import ConfigError

MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}

_THEIRS: tuple[type, ...] = tuple(cls for cls in (foreign("PeftConfig"),) if cls is not None)


class PeftConfig(core.PeftConfig, *_THEIRS):  # type: ignore[misc]
    """What is common to every adapter's configuration; see :class:`lorica.PeftConfig`."""

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> core.PeftConfig:
        made: core.PeftConfig = ours(super()._from_fields(fields))
        return made

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> core.PeftConfig:
        """Read the configuration of a saved adapter, from a directory or the hub.

        Raises:
            ValueError: there is no ``adapter_config.json``.
        """
        place = pretrained_model_name_or_path
        if os.path.isdir(place) and not os.path.isfile(os.path.join(place, subfolder or "", CONFIG_NAME)):
            raise ConfigError(f"Can't find '{CONFIG_NAME}' at '{place}'")
        return super().from_pretrained(place, subfolder=subfolder, **kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a configuration that is about to be made, checked; a hook for subclasses."""
        return kwargs

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike[str], **options: Any) -> str:
        from huggingface_hub import hf_hub_download

        from lorica.files.hub import find_file

        known = set(inspect.signature(hf_hub_download).parameters) - {"subfolder"}
        hub = {name: value for name, value in options.items() if name in known}
        found = find_file(model_id, CONFIG_NAME, subfolder=options.get("subfolder"), **hub)
        return str(cls.from_json_file(found)["peft_type"])


class PromptLearningConfig(PeftConfig):
    """The base of prompt-learning configurations, which lorica does not have: it adapts weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: lorica adapts weights by LoRA, not prompts; use peft for prompt learning"
        )

    @property
    def is_prompt_learning(self) -> bool:
        """Always true."""
        return True


def ours(config: Any) -> Any:
    """Return ``config`` as a configuration of this package: itself, or a copy of a core or of a peft one.

    Raises:
        ConfigError: it is a configuration of another method than LoRA.
        TypeError: it is no configuration.
    """
    from lorica.compat.peft.tuners.lora.config import LoraConfig, LoraRuntimeConfig

    if isinstance(config, PeftConfig):
        return config
    if isinstance(config, core.PeftConfig):
        made = copy.copy(config)
        made.__class__ = LoraConfig if isinstance(config, core.LoraConfig) else PeftConfig
        return made
    if not isinstance(config, _THEIRS or ()) or not dataclasses.is_dataclass(config):
        raise TypeError(f"a PeftConfig is expected, got {type(config)}")
    if type(config).__name__ != "LoraConfig":
        raise ConfigError(f"{type(config).__name__}: lorica adapts by LoRA only; use peft for other methods")
    known = {item.name for item in dataclasses.fields(LoraConfig)} - {"peft_type"}
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config) if item.name in known}
    values = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        for name, value in values.items()
    }
    values["runtime_config"] = LoraRuntimeConfig(**(values.get("runtime_config") or {}))
    return LoraConfig(**{name: copy.copy(value) for name, value in values.items()})


__all__ = ["CONFIG_NAME", "PeftConfig", "PeftType", "PromptLearningConfig", "TaskType"]
