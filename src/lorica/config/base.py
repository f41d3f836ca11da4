"""The configuration every adapter carries, and how it is written and found again.

The names, defaults and the JSON form are PEFT's, so that its tools read our files and we read theirs.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lorica.config.fields import check_types, quoted
from lorica.errors import ConfigError, suggest
from lorica.files.atomic import write_json
from lorica.files.hub import find_file
from lorica.files.json import read_json_object

CONFIG_NAME = "adapter_config.json"
#: Options that are paths on the machine that wrote them. A file could name any file of the machine that reads it.
PATH_OPTIONS = (("corda_config", "cache_file"), ("corda_config", "covariance_file"))


class TaskType(str, enum.Enum):
    """What the adapted model is used for; chooses the ``PeftModelFor…`` class and the heads that train fully."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """The method of adaptation. There is one here."""

    LORA = "LORA"


@dataclass
class PeftConfig:
    """What is common to every adapter's configuration.

    Raises:
        ConfigError: ``task_type`` or ``peft_type`` is not a known one, or a value has the wrong type.
    """

    task_type: str | TaskType | None = field(default=None, metadata={"help": "What the model is used for."})
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "The method; always LORA."})
    auto_mapping: dict[str, Any] | None = field(
        default=None, metadata={"help": "Class and library of the base model, for the reader's information."}
    )
    peft_version: str | None = field(
        default=None, metadata={"help": "The version of PEFT that wrote the file, if PEFT wrote it."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Where the base model was loaded from."}
    )
    revision: str | None = field(default=None, metadata={"help": "The revision of the base model."})
    inference_mode: bool = field(default=False, metadata={"help": "Load the adapter frozen."})

    #: Fields that live at run time only and are never written.
    _not_saved: ClassVar[frozenset[str]] = frozenset()
    #: Fields that PEFT does not know; written only where they differ from their default.
    _own_fields: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        base: Any = self.base_model_name_or_path
        if isinstance(base, os.PathLike):
            self.base_model_name_or_path = str(os.fspath(base))
        self._check_types()
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = [task.value for task in TaskType]
            raise ConfigError(
                f"Invalid task type: {quoted(self.task_type)}. Must be one of the following task types: "
                f"{', '.join(known)}.{suggest(self.task_type, known)} (task_type)"
            )
        if self.peft_type is not None and self.peft_type not in list(PeftType):
            raise ConfigError(f"peft_type={quoted(self.peft_type)}: lorica adapts by LoRA only; use 'LORA'")

    def _check_types(self) -> None:
        check_types(self, PeftConfig, type(self).__name__)

    @property
    def is_prompt_learning(self) -> bool:
        """Always false: LoRA adapts weights, not prompts."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always false: LoRA adapts weights, not prompts."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values, without those that live at run time only."""
        result: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in self._not_saved or (item.name in self._own_fields and value == item.default):
                continue
            result[item.name] = dataclasses.asdict(value) if _is_instance(value) else copy.copy(value)
        return result

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into ``save_directory``, in one step.

        Raises:
            AssertionError: ``save_directory`` is a file.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        output = self.to_dict()
        if (auto_mapping := kwargs.pop("auto_mapping_dict", None)) is not None:
            output["auto_mapping"] = auto_mapping
        write_json(Path(save_directory) / CONFIG_NAME, {name: _json(value) for name, value in output.items()})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the configuration class that ``peft_type`` in ``kwargs`` names (without one: this class).

        Unknown keys are left out with a warning: files of later versions stay readable.
        """
        return cls._from_fields(kwargs)

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> PeftConfig:
        target: type[PeftConfig] = cls
        if fields.get("peft_type") is not None:
            from lorica.config.lora import LoraConfig  # the subclass, which imports this module

            PeftConfig(peft_type=fields["peft_type"])
            target = LoraConfig
        known = {item.name for item in dataclasses.fields(target)}
        unknown = sorted(fields.keys() - known)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {quoted(unknown)} for class {target.__name__}, these are ignored: the "
                "configuration was probably written by a later version.",
                stacklevel=3,
            )
        return target(**{name: value for name, value in fields.items() if name in known})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the configuration of a saved adapter, from a directory or the hub.

        Keyword arguments that ``huggingface_hub.hf_hub_download`` knows are handed to it; the others are
        defaults for fields that the file does not name.

        Raises:
            CheckpointError: there is no ``adapter_config.json``, or it is not readable JSON.
            ConfigError: a field has an impossible value; file and field are named.
        """
        from huggingface_hub import hf_hub_download

        hub_names = inspect.signature(hf_hub_download).parameters
        hub = {name: value for name, value in kwargs.items() if name in hub_names}
        rest = {name: value for name, value in kwargs.items() if name not in hub_names}
        path = find_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        fields = {**rest, **cls.from_json_file(path)}
        try:
            return cls._from_fields(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Return the fields in a configuration file, as a dictionary.

        Raises:
            CheckpointError: the file is not a JSON object of reasonable size.
        """
        loaded = read_json_object(Path(path_json_file))
        if loaded.pop("runtime_config", None) is not None:
            warnings.warn("The configuration file contains a `runtime_config` key. This is ignored.", stacklevel=2)
        for group, name in PATH_OPTIONS:
            options = loaded.get(group)
            if isinstance(options, dict) and options.get(name) is not None:
                options[name] = None
                warnings.warn(
                    f"The configuration file names a file to be read and written in `{group}.{name}`. This is ignored; "
                    "set it on the configuration if you want it.",
                    stacklevel=2,
                )
        return loaded


def _is_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else value
