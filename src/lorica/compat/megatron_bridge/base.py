"""``megatron.bridge.peft.base``: what all methods of adaptation have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from lorica.adapt.found import lora_layers
from lorica.compat.megatron_bridge._chunks import chunks_of

#: A model, or the list of a pipeline stage's chunks.
Model = TypeVar("Model", bound="nn.Module | list[Any]")


@dataclass
class PEFT(ABC):
    """A method of adaptation: called on a model it freezes the base and puts adapters in.

    Attributes:
        params_to_save: names of parameters that train and of statistics, from :meth:`set_params_to_save`.
    """

    params_to_save: set[str] = field(default_factory=set, init=False, repr=False)

    @abstractmethod
    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Return what stands in a module's place: it, or it with an adapter.

        Args:
            module: any module of the model.
            name: its name in the module that holds it.
            prefix: the full name of that one.
        """

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Freeze the base model, as :meth:`freeze_model` says, and put the adapters in.

        Args:
            model: a model, or the list of a pipeline stage's chunks; changed in place.
            training: whether it is to be trained; otherwise everything is frozen.

        Returns:
            The same object.
        """
        chunks = chunks_of(model)
        self.freeze_model(model, training=training)
        training_too = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        self.adapt(chunks)
        for parameter in training_too:
            parameter.requires_grad_(True)
        for chunk in chunks:
            if not training:
                chunk.requires_grad_(False)
        _set_mode(model, training=training)
        return model

    def adapt(self, chunks: list[Any]) -> None:
        """Put the adapters in: by :meth:`transform` on every module, unless a method knows better."""
        for chunk in chunks:
            _walk(self, chunk, "")

    def freeze_model(self, model: nn.Module | list[Any], training: bool = True) -> None:
        """Freeze what is not to train beside the adapters; here that is the whole model.

        Args:
            model: a model, or the list of a pipeline stage's chunks.
            training: whether to put it into training mode.
        """
        for chunk in chunks_of(model):
            chunk.requires_grad_(False)
        if training:
            _set_mode(model, training=True)

    def enable_adapter_layers(self, model: nn.Module | list[Any]) -> None:
        """Turn the adapters of a model on."""
        _switch(model, on=True)

    def disable_adapter_layers(self, model: nn.Module | list[Any]) -> None:
        """Turn the adapters of a model off: it is the base model then."""
        _switch(model, on=False)

    @contextmanager
    def disable_adapter(self, model: nn.Module | list[Any]) -> Iterator[None]:
        """Turn the adapters of a model off inside a ``with`` block."""
        self.disable_adapter_layers(model)
        try:
            yield
        finally:
            self.enable_adapter_layers(model)

    def set_params_to_save(self, model: nn.Module | list[Any]) -> None:
        """Take down what a checkpoint of the training holds: parameters that train, and running statistics.

        Args:
            model: an adapted model, or the list of a pipeline stage's chunks.
        """
        self.params_to_save = set()
        for chunk in model if isinstance(model, list) else [model]:
            self.params_to_save |= {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
            for name, module in chunk.named_modules():
                if hasattr(module, "track_running_stats"):
                    self.params_to_save |= {f"{name}.{key}" for key, _ in module.named_buffers()}

    def adapter_key_filter(self, key: str | tuple[Any, ...]) -> bool:
        """Whether a checkpoint of the training holds what is saved under ``key``.

        Args:
            key: a name, or, as in distributed checkpoints, a tuple whose second entry is the parameter.
        """
        if isinstance(key, tuple):
            return bool(key[1].requires_grad)
        return key in self.params_to_save or any(word.startswith("lora_") for word in key.split("."))


def _walk(method: PEFT, module: nn.Module, prefix: str) -> None:
    for name, child in list(module.named_children()):
        new = method.transform(child, name, prefix or None)
        if new is not child:
            module._modules[name] = new
        else:
            _walk(method, child, f"{prefix}.{name}" if prefix else name)


def _set_mode(model: nn.Module | list[Any], *, training: bool) -> None:
    for chunk in model if isinstance(model, list) else [model]:
        chunk.train(training)


def _switch(model: nn.Module | list[Any], *, on: bool) -> None:
    for chunk in chunks_of(model):
        for layer in lora_layers(chunk):
            layer.switch.enabled = on
