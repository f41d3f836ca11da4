"""``PeftModel``: the adapted model as users hold it, with PEFT's interface."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from lorica import combine
from lorica.adapt.trainable import is_checkpointing, let_inputs_require_grad
from lorica.checkpoint import loading, saving
from lorica.checkpoint.reading import LoadResult
from lorica.config import LoraConfig, TaskType
from lorica.errors import AdapterError
from lorica.model.lora_model import LoraModel
from lorica.model.status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from lorica.targets.resolve import config_of
from lorica.targets.saved import TASK_HEADS


class PeftModel(nn.Module):
    """A base model with adapters, which saves and loads them.

    Args:
        model: the model to adapt, in place.
        peft_config: the configuration of the first adapter; it is copied.
        adapter_name: its name.
        autocast_adapter_dtype: give 16-bit base weights float32 factors.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.

    Raises:
        TargetError: the configuration does not fit the model. The model is then as it was.
    """

    #: The class for each task; subclasses enter themselves.
    by_task: ClassVar[dict[TaskType, type[PeftModel]]] = {}
    #: The class that holds the adapters.
    tuner_class: ClassVar[type[LoraModel]] = LoraModel

    def __init_subclass__(cls, task: TaskType | None = None) -> None:
        if task is not None:
            PeftModel.by_task[task] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        config = self._own_config(model, peft_config)
        checkpointing = is_checkpointing(model)
        self.base_model = self.tuner_class(
            model,
            config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self.training = model.training
        self.base_model.training = model.training
        if checkpointing:
            let_inputs_require_grad(model)

    @staticmethod
    def _own_config(model: nn.Module, peft_config: LoraConfig) -> LoraConfig:
        config = copy.copy(peft_config)
        if config.base_model_name_or_path is None:
            path = getattr(model, "name_or_path", None) or config_of(model).get("_name_or_path")
            config.base_model_name_or_path = path if isinstance(path, str) and path else None
        if config.task_type in TASK_HEADS:
            heads = TASK_HEADS[TaskType(config.task_type)]
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
        return config

    def __getattr__(self, name: str) -> Any:
        """Look in the base model for what this wrapper does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model; see :meth:`LoraModel.generate`."""
        return self.base_model.generate(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """Return the model that is adapted."""
        return self.base_model.model

    # ---- adapters ---------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The configuration of each adapter."""
        return self.base_model.peft_config

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the active adapter (the first, where several are)."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str:
        """The method: LoRA."""
        return "LORA"

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list where several are."""
        return self.base_model.active_adapter

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter takes part in a forward."""
        return self.base_model.switch.enabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that train fully, over all adapters."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put a further adapter in; ``set_adapter`` makes it active.

        Raises:
            AdapterError: the name is taken or impossible.
            TargetError: the configuration does not fit the model. The model is then as it was.
        """
        self.base_model.add_adapter(
            adapter_name,
            self._own_config(self.get_base_model(), peft_config),
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several; see :meth:`LoraModel.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see :meth:`LoraModel.delete_adapter`."""
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} does not exist; there are {list(self.peft_config)}")
        self.base_model.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Turn all adapters off inside a ``with`` block, for all threads."""
        with self.base_model.switch.off():
            self.base_model.disable_adapter_layers()  # which warns of biases
            yield

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Let the parameters of the named adapters train, or freeze them."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    # ---- state ------------------------------------------------------------------------------------------------------

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the state of every adapted layer."""
        with self.base_model.switch.turns.reading:
            return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the state of the model as a whole."""
        with self.base_model.switch.turns.reading:
            return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters train, and how many there are."""
        with self.base_model.switch.turns.reading:
            return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, and how many there are."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype the base model was loaded in."""
        return getattr(self.get_base_model(), "dtype", None)

    # ---- gradient checkpointing -------------------------------------------------------------------------------------

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn gradient checkpointing on in the base model.

        Only factors train, and a re-entrant checkpoint passes no gradient to them unless its input requires one; so the
        embedding's output is made to.
        """
        model = self.get_base_model()
        # transformers 5.23 renamed method and argument; older releases know only the second name, callers know either.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        spellings = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        options = {f"{kind}_checkpointing_kwargs" if name in spellings else name: kwargs[name] for name in kwargs}
        enable: Any = getattr(model, f"{kind}_checkpointing_enable")
        enable(*args, **options)
        let_inputs_require_grad(model)

    gradient_checkpointing_enable = activation_checkpointing_enable

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT does: the adapter "default" into the directory, others into folders of their names.

        Args:
            save_directory: made where it does not exist.
            safe_serialization: must be true; pickled weights are not written.
            selected_adapters: which adapters; None: all.
            save_embedding_layers: write the embedding and output weights of the base model too. ``"auto"``: where they
                are targets or the vocabulary was resized.
            is_main_process: only then is anything written.
            path_initial_model_for_weight_conversion: directory of the adapter as it was before it was trained, where
                its start was taken out of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA). What is written then is
                plain LoRA for the base model that everybody has, of twice the rank, exactly as it was trained.
            kwargs: ``state_dict``: take the tensors from it, under their live names.

        Raises:
            AdapterError: a selected adapter does not exist.
            CheckpointError: the directory is a file, ``safe_serialization`` is false, or the initial adapter is no
                start of this one.
        """
        initial = path_initial_model_for_weight_conversion
        with self.base_model.switch.turns.changing():  # nothing is swapped while it is written; forwards go on
            saving.save_adapters(
                self,
                save_directory,
                safe_serialization=safe_serialization,
                selected=selected_adapters,
                save_embedding_layers=save_embedding_layers,
                write=is_main_process,
                state_dict=kwargs.get("state_dict"),
                convert=None if initial is None else combine.converter(self, initial),
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool | None = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter into ``model``, in place.

        Args:
            model: the base model.
            model_id: a directory or a repository of the hub.
            adapter_name: the name it gets here.
            is_trainable: whether it trains; otherwise it is frozen.
            config: to use instead of the one in the file.
            autocast_adapter_dtype: give 16-bit base weights float32 factors.
            ephemeral_gpu_offload: move weights that lie on the CPU to the accelerator while a start or DoRA's norms are
                computed from them; without an accelerator nothing changes.
            low_cpu_mem_usage: accepted; loading never makes factors twice.
            key_mapping: regular expression → replacement, applied to the names in the file.
            strict: whether missing and unexpected tensors are errors; otherwise they are warnings. None: warnings too,
                and factors are made only where the file lacks some.
            kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir`` …, for the hub.

        Raises:
            CheckpointError: the file cannot be read, or tensors are missing, unexpected, of the wrong shape or not
                finite; they are named. The model is then as it was.
            TargetError: the configuration does not fit the model. The model is then as it was.
        """

        def wrap(found: LoraConfig, on_meta: bool) -> PeftModel:
            found.runtime_config = replace(found.runtime_config, ephemeral_gpu_offload=ephemeral_gpu_offload)
            by_task = "by_task" in vars(cls) and found.task_type is not None
            kind = cls.by_task[TaskType(found.task_type)] if by_task else cls
            return kind(model, found, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=on_meta)

        return loading.load_first(
            wrap,
            model,
            model_id,
            adapter_name,
            config=config,
            is_trainable=is_trainable,
            key_mapping=key_mapping,
            strict=strict,
            source=kwargs,
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool | None = True,
        **kwargs: Any,
    ) -> LoadResult:
        """Load a further adapter, or the weights of one that is there; see :meth:`from_pretrained` for the arguments.

        It is not active before :meth:`set_adapter` makes it so. ``torch_device`` is accepted and has no effect: factors
        lie where their base layer lies. Over an adapter that is there, its configuration stays (as in PEFT); where the
        files have another scale, a warning says so.

        Returns:
            The names of missing and unexpected tensors; both empty unless ``strict`` is false.
        """
        return loading.load_further(
            self,
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            autocast=autocast_adapter_dtype,
            key_mapping=key_mapping,
            strict=strict,
            source=kwargs,
            offload=ephemeral_gpu_offload,
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write ``README.md``, or bring the facts at the head of the one that is there up to date."""
        saving.write_model_card(self, output_dir)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **kwargs: Any) -> Any:
        """Save the adapters and upload them to the hub.

        Args:
            repo_id: the repository; made where it does not exist.
            private: whether a new repository is private.
            kwargs: ``token``, ``commit_message``, ``revision``, ``create_pr`` …, for the hub.

        Returns:
            What ``huggingface_hub.HfApi.upload_folder`` returns.
        """
        return saving.push_to_hub(self, repo_id, private=private, **kwargs)
