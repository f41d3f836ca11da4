"""peft.peft_model: the adapted model as users hold it, which Trainer, TRL and accelerate take as peft's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from lorica import model as core
from lorica.adapt.trainable import let_inputs_require_grad
from lorica.checkpoint.reading import LoadResult
from lorica.compat.peft._library import beneath
from lorica.compat.peft.config import ours
from lorica.compat.peft.tuners.lora.model import LoraModel
from lorica.config import LoraConfig, TaskType
from lorica.errors import AdapterError, ConfigError
from lorica.model import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status


class PeftModel(core.PeftModel, *beneath("PeftModel")):  # type: ignore[misc]
    """A base model with adapters, which saves and loads them; see :class:`lorica.PeftModel`.

    Loading warns of missing and unexpected tensors, as PEFT does, unless ``strict`` is true.
    """

    by_task: ClassVar[dict[TaskType, type[PeftModel]]] = {}  # type: ignore[assignment]
    tuner_class: ClassVar[type[core.LoraModel]] = LoraModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    @staticmethod
    def _own_config(model: nn.Module, peft_config: Any) -> LoraConfig:
        return core.PeftModel._own_config(model, ours(peft_config))

    # torch looks for the setter on the class, and Python for the whole property
    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The configuration of each adapter."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, LoraConfig]) -> None:
        self.base_model.peft_config = value

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put a further adapter in; see :meth:`lorica.PeftModel.add_adapter`.

        Raises:
            AdapterError: the name is taken or impossible.
            TargetError: the configuration does not fit the model. The model is then as it was.
        """
        if adapter_name in self.peft_config:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists.")
        warn_of_name(adapter_name)
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several; see :meth:`lorica.PeftModel.set_adapter`.

        Raises:
            AdapterError: a name is unknown.
        """
        if isinstance(adapter_name, str) and adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} not found.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Put a saved adapter into ``model``, in place; see :meth:`lorica.PeftModel.from_pretrained`.

        Raises:
            ConfigError: ``config`` is no configuration.
        """
        config = args[2] if len(args) > 2 else kwargs.get("config")
        if config is not None and not hasattr(config, "peft_type"):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}")
        load: Callable[..., Any] = super().from_pretrained
        loaded = load(model, model_id, *args, **{"strict": None, **kwargs})
        is_trainable = args[1] if len(args) > 1 else kwargs.get("is_trainable", False)
        return loaded if is_trainable else loaded.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> LoadResult:
        """Load a further adapter, or the weights of one that is there; see :meth:`lorica.PeftModel.load_adapter`.

        Unless it is to train, the model goes into evaluation mode.
        """
        load: Callable[..., LoadResult] = super().load_adapter
        loaded = load(model_id, adapter_name, is_trainable, *args, **{"strict": None, **kwargs})
        if not is_trainable:
            self.eval()
        return loaded

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Make the embedding's output require gradients, where the model is quantised or checkpoints; return it."""
        if not (getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)):
            let_inputs_require_grad(model)
        return model


def warn_of_name(adapter_name: str) -> None:
    """Warn of an adapter whose name is part of ``"lora_"``, which names of parameters hold."""
    if adapter_name in LoraModel.prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{LoraModel.prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )


class PeftModelForCausalLM(
    core.PeftModelForCausalLM,
    PeftModel,
    *beneath("PeftModelForCausalLM"),  # type: ignore[misc]
):
    """A decoder that generates text."""


class PeftModelForSeq2SeqLM(
    core.PeftModelForSeq2SeqLM,
    PeftModel,
    *beneath("PeftModelForSeq2SeqLM"),  # type: ignore[misc]
):
    """An encoder and a decoder that generates text."""


class PeftModelForSequenceClassification(
    core.PeftModelForSequenceClassification,
    PeftModel,
    *beneath("PeftModelForSequenceClassification"),  # type: ignore[misc]
):
    """A model that classifies texts; its head trains fully."""


class PeftModelForTokenClassification(
    core.PeftModelForTokenClassification,
    PeftModel,
    *beneath("PeftModelForTokenClassification"),  # type: ignore[misc]
):
    """A model that classifies tokens; its head trains fully."""


class PeftModelForQuestionAnswering(
    core.PeftModelForQuestionAnswering,
    PeftModel,
    *beneath("PeftModelForQuestionAnswering"),  # type: ignore[misc]
):
    """A model that finds answers in a text; its head trains fully."""


class PeftModelForFeatureExtraction(
    core.PeftModelForFeatureExtraction,
    PeftModel,
    *beneath("PeftModelForFeatureExtraction"),  # type: ignore[misc]
):
    """A model whose hidden states are wanted."""


PeftModel.by_task.update(
    {
        TaskType.CAUSAL_LM: PeftModelForCausalLM,
        TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
        TaskType.SEQ_CLS: PeftModelForSequenceClassification,
        TaskType.TOKEN_CLS: PeftModelForTokenClassification,
        TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
        TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
    }
)

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
]
