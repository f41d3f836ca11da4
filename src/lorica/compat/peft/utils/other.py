"""peft.utils.other: modules that train beside the factors, and small helpers."""

from __future__ import annotations

import functools
import os
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.adapt import trainable
from lorica.compat.peft._library import beneath
from lorica.compat.peft.utils.constants import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    SEQ_CLS_HEAD_NAMES,
    TOKENIZER_CONFIG_NAME,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    WEIGHTS_NAME,
)
from lorica.errors import AdapterError
from lorica.helpers import cast_mixed_precision_params, prepare_model_for_kbit_training
from lorica.layers import ModulesToSaveWrapper as Core
from lorica.layers import Switch
from lorica.layers import TrainableTokensWrapper as CoreTokens


class AuxiliaryTrainingWrapper(nn.Module, ABC):
    """A module that trains beside the factors. All of a model share one switch with its adapted layers."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    merged_adapters: ClassVar[tuple[str, ...]] = ()

    switch: Switch  # of the module that this class is mixed into

    @property
    def active_adapters(self) -> list[str]:
        """Names of those active adapters of the model that this module has a part in."""
        return [name for name in self.switch.active if name in self._get_available_adapters()]

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list where it is not exactly one."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def disable_adapters(self) -> bool:
        """Whether the model's adapters are turned off."""
        return not self.switch.enabled

    @property
    def _adapters(self) -> set[str]:
        return self._get_available_adapters()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters of the model on or off."""
        with self.switch.turns.writing():
            self.switch.enabled = enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make the named adapter the active one of the model; this module's parameters of it train.

        Args:
            adapter_names: one name; a list of several is refused.
            inference_mode: freeze it.

        Raises:
            AdapterError: several adapters are named that have a part in this module.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        own = self._get_available_adapters()
        if sum(name in own for name in names) > 1:
            raise AdapterError(f"Attempted to set multiple ({list(names)}) adapters at once for modules_to_save.")
        with self.switch.turns.writing():
            self.switch.active = names
            for name in own:
                self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let this module's parameters of the named adapters train, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = self._get_available_adapters()
        trainable.set_requires_grad(self, [name for name in names if name in known], requires_grad)

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError


class ModulesToSaveWrapper(
    AuxiliaryTrainingWrapper,
    Core,
    *beneath("utils.other.ModulesToSaveWrapper"),  # type: ignore[misc]
):
    """A module that trains fully, in a copy per adapter; see :class:`lorica.layers.ModulesToSaveWrapper`."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Forget an adapter's copy; one that is not there is no error."""
        self.remove_adapter(adapter_name)
        if new_active_adapters is not None:
            self.set_adapter(list(new_active_adapters))

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return, for each tensor of an adapter's copy, its name in a file → its name below this module."""
        if adapter_name not in self.modules_to_save:
            return {}
        names = self.modules_to_save[adapter_name].state_dict()
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in names}

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of an adapter's copy under the names that they have in a file.

        Args:
            adapter_name: the adapter's name.
            state_dict: where to take them from, by their names below this module.
        """
        return {name: state_dict[live] for name, live in self.adapter_state_dict_load_map(adapter_name).items()}

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)


class TrainableTokensWrapper(
    AuxiliaryTrainingWrapper,
    CoreTokens,
    *beneath("utils.other.TrainableTokensWrapper"),  # type: ignore[misc]
):
    """A module of which rows train; see :class:`lorica.layers.TrainableTokensWrapper`."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: ClassVar[tuple[str, ...]] = ("token_adapter.token_indices",)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Forget an adapter's rows; rows that are not there are no error."""
        self.remove_adapter(adapter_name)
        if new_active_adapters is not None:
            self.set_adapter(list(new_active_adapters))

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the name of an adapter's rows in a file → their name below this module; tied rows have none."""
        layer = self.token_adapter
        if layer.tied_adapter is not None or adapter_name not in layer.trainable_tokens_delta:
            return {}
        rows = "token_adapter.trainable_tokens_delta"
        return {rows: f"{rows}.{adapter_name}"}

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's rows under the name that they have in a file.

        Args:
            adapter_name: the adapter's name.
            state_dict: where to take them from, by their name below this module.
        """
        return {name: state_dict[live] for name, live in self.adapter_state_dict_load_map(adapter_name).items()}

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_adapter.token_indices)


AuxiliaryTrainingWrapper.register(Core)
AuxiliaryTrainingWrapper.register(CoreTokens)


def infer_device() -> str:
    """Return the kind of accelerator that there is, or ``"cpu"``."""
    if torch.cuda.is_available():
        return "cuda"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Return the policy by which ``FullyShardedDataParallel`` wraps an adapted transformers model.

    It wraps each block of the model, and each module without children whose weight trains, so that the flat parameters
    of FSDP hold either frozen or trained weights.

    Args:
        model: an adapted model whose base model names its blocks (``_no_split_modules``), or the environment does
            (``FSDP_TRANSFORMER_CLS_TO_WRAP``).

    Raises:
        TypeError: no module of the model is of a class that is named.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    own = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(own))).split(",")
    classes = {type(module).__name__: type(module) for module in model.modules()}
    blocks = {classes[name] for name in named if name in classes}
    if any(named) and not blocks:
        raise TypeError("Could not find the transformer layer class to wrap in the model.")

    def is_trained_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not any(True for _ in module.children()) and weight is not None and weight.requires_grad

    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trained_leaf)
    layers = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    return functools.partial(_or_policy, policies=[leaves, layers])


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Return what a decoder reads while it learns to write ``input_ids``.

    Args:
        input_ids: ``[batch, length]``; -100 marks padding.
        pad_token_id: stands for -100.
        decoder_start_token_id: stands first.

    Raises:
        ValueError: there is no ``pad_token_id``.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def transpose(weight: Any, fan_in_fan_out: bool) -> Any:
    """Return the weight, transposed if it is stored ``[in, out]``."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "infer_device",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "transpose",
]
