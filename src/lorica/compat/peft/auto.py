"""peft.auto: an adapter and the base model that its configuration names, in one call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lorica.compat.peft.config import PeftConfig
from lorica.compat.peft.peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from lorica.compat.peft.utils.constants import TOKENIZER_CONFIG_NAME
from lorica.config.fields import quoted
from lorica.errors import ConfigError

#: Task → the class of the adapted model. Tasks are strings, so that both spellings find theirs.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, type[PeftModel]] = {
    task.value: cls for task, cls in PeftModel.by_task.items()
}


def get_default_import_allowlist() -> list[str]:
    """Return the packages from which a configuration may name the base model's class."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether ``parent_name`` is one of the packages in ``allowlist``, or a module of one."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _Auto:
    """Loads the base model that an adapter's configuration names, and the adapter into it."""

    _auto_class: ClassVar[str | None] = None
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the `{name}.from_pretrained(pretrained_model_name_or_path)` "
            f"or `{name}.from_config(config)` methods."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load a base model and an adapter.

        Args:
            pretrained_model_name_or_path: the adapter, on the disk or on the hub.
            adapter_name: the name that it gets.
            is_trainable: whether it trains.
            config: to use instead of the one that was saved with it.
            revision: of the adapter.
            import_allowlist: packages and modules that may be imported because the configuration names them. Without
                it the base model's class is looked up among the public names of transformers (or another package of
                the default), and nothing is imported that they do not import themselves.
            kwargs: for the base model's ``from_pretrained`` and the adapter's. ``trust_remote_code`` is False.

        The base model is loaded from where the adapter says (``base_model_name_or_path``): a directory, or a repository
        of the hub.

        Raises:
            ValueError: the adapter is for another task, or its base model's class is unknown or not allowed.
            ConfigError: the configuration does not name a base model, or names what is no model.
        """
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **_hub(kwargs))
        base_class = cls._base_class(saved, import_allowlist)
        if not saved.base_model_name_or_path:
            raise ConfigError(f"{pretrained_model_name_or_path}: base_model_name_or_path does not name the base model")
        kwargs.setdefault("trust_remote_code", False)  # the base model is named by the adapter, not by the caller
        base = base_class.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **kwargs)
        _make_room(base, pretrained_model_name_or_path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(  # type: ignore[no-any-return]
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **_hub(kwargs),
        )

    @classmethod
    def _base_class(cls, config: Any, allowlist: Sequence[str] | None) -> Any:
        task = config.task_type
        if task is not None and cls._auto_class is None:
            raise ValueError(
                "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. (e.g. "
                "`AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
            )
        if task is not None:
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
            asked = cls._target_peft_class.__name__
            if asked != expected:
                raise ValueError(
                    f"Expected target PEFT class: {expected}, but you have asked for: {asked} make sure that you are "
                    "loading the correct model for your task type."
                )
            return getattr(importlib.import_module("transformers"), str(cls._auto_class))
        if config.auto_mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model "
                "for your task type."
            )
        parent, name = (config.auto_mapping.get(key) for key in ("parent_library", "base_model_class"))
        for key, value in (("parent_library", parent), ("base_model_class", name)):
            if not isinstance(value, str):
                raise ConfigError(f"auto_mapping: {key}={quoted(value)} is not a name")
        if not check_import_allowlist(get_default_import_allowlist() if allowlist is None else allowlist, parent):
            raise ValueError(
                f"The auto mapping wants to import {quoted(parent)} which is not in the import allowlist. If you are "
                f"sure that importing this library is safe, specify `import_allowlist=[{quoted(parent)}]` in "
                "`from_pretrained()`."
            )
        return _class_of(parent, name, alone=allowlist is None)


def _class_of(parent: str, name: str, *, alone: bool) -> type[nn.Module]:
    """Return the class of a model that a configuration names.

    Args:
        parent: the module that it says the class is from, an allowed one.
        name: the class's.
        alone: take it from the public names of the module's package, and import nothing else.

    Raises:
        ConfigError: there is no such class, or it is no model.
    """
    module = parent.partition(".")[0] if alone else parent
    try:
        found = getattr(importlib.import_module(module), name, None) if not name.startswith("_") else None
    except ImportError as error:
        raise ConfigError(f"auto_mapping: parent_library={quoted(parent)} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "from_pretrained")):
        hint = f"; if it is {parent}'s, pass import_allowlist=[{quoted(parent)}]" if alone and found is None else ""
        raise ConfigError(
            f"auto_mapping: base_model_class={quoted(name)} is no model that {module} has under that name{hint}"
        )
    return found


def _hub(options: dict[str, Any]) -> dict[str, Any]:
    names = ("subfolder", "token", "cache_dir", "force_download", "local_files_only", "proxies")
    return {name: options[name] for name in names if name in options}


def _make_room(base: Any, adapter: str | os.PathLike[str], revision: str | None, options: dict[str, Any]) -> None:
    """Resize the embedding where the tokenizer that was saved with the adapter knows more tokens."""
    if not (Path(adapter) / TOKENIZER_CONFIG_NAME).exists() or not hasattr(base, "get_input_embeddings"):
        return
    from transformers import AutoTokenizer

    trust = options.get("trust_remote_code", False)
    tokenizer = AutoTokenizer.from_pretrained(adapter, revision=revision, trust_remote_code=trust)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_Auto):
    """For adapters without a task."""


class AutoPeftModelForCausalLM(_Auto):
    """For decoders that generate text."""

    _auto_class = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_Auto):
    """For encoders with decoders that generate text."""

    _auto_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_Auto):
    """For models that classify texts."""

    _auto_class = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_Auto):
    """For models that classify tokens."""

    _auto_class = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_Auto):
    """For models that find answers in a text."""

    _auto_class = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_Auto):
    """For models whose hidden states are wanted."""

    _auto_class = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]
