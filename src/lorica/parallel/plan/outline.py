"""A model on the meta device in which layers that are equal stand once, and how often each of them counts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config import LoraConfig
from lorica.engines.native.blocks import decoder_of
from lorica.errors import LayoutError
from lorica.targets.plan import make_plan


class _Left(nn.Module):
    """Stands for a layer that is equal to one which is there."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hand on."""
        return x


class Outline:
    """The whole model, layer by layer.

    Two decoder layers are of one kind when their modules, the shapes and dtypes of their parameters, what the model's
    configuration says of them and what the adapter puts into them are equal: then they are cut, adapted and run alike.

    Args:
        model: a transformers model on the meta device, in one piece, without adapters. It is taken apart.
        config: the adapter's configuration.

    Attributes:
        kinds: the kind of each decoder layer; empty where the model has no decoder layers that could be told.
        parameters: logical parameters of the base model.
    """

    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        model.requires_grad_(False)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._model, self._name, self._layers = model, "", list[nn.Module]()
        self.kinds: tuple[int, ...] = ()
        plan = make_plan(model, config)
        targets: dict[str, Any] = {target.name: (type(target.op), target.spec) for target in plan.targets}
        targets |= plan.saved
        try:
            self._name, decoder = decoder_of(model)
        except LayoutError:
            return
        layers: Any = decoder.layers
        self._layers = list(layers)
        self.kinds = _kinds(self._layers, f"{self._name}.layers" if self._name else "layers", decoder, targets)
        for index in range(len(layers)):
            layers[index] = _Left()

    def build(self, layers: Collection[int]) -> Any:
        """Return a copy of the model that has these decoder layers only; the others hand on what they get."""
        made = copy.deepcopy(self._model)
        if self._layers:
            places: Any = made.get_submodule(self._name).layers
            for index in layers:
                places[index] = copy.deepcopy(self._layers[index])
        return made

    def counts(self, layers: Collection[int]) -> dict[int, int]:
        """Return the first of these layers of each kind, and how many are of its kind."""
        number = Counter(self.kinds[index] for index in layers)
        first: dict[int, int] = {}
        for index in sorted(layers):
            first.setdefault(self.kinds[index], index)
        return {index: number[kind] for kind, index in first.items()}

    def times(self, name: str, counts: dict[int, int]) -> int:
        """Return how often a parameter of a built model counts."""
        prefix = f"{self._name}.layers." if self._name else "layers."
        at = name.find(prefix)
        if at < 0 or not self._layers:
            return 1
        return counts[int(name[at + len(prefix) :].partition(".")[0])]


def _kinds(layers: list[nn.Module], path: str, decoder: Any, targets: dict[str, Any]) -> tuple[int, ...]:
    types = getattr(decoder.config, "layer_types", None) or [None] * len(layers)
    inside: list[list[Any]] = [[] for _ in layers]
    for name, target in targets.items():
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and number.isdigit():
            inside[int(number)].append((rest, target))
    found: dict[Any, int] = {}
    kinds = []
    for index, layer in enumerate(layers):
        parts = tuple((name, part.shape, part.dtype) for name, part in _tensors(layer))
        looks = (repr(layer), parts, types[index], repr(inside[index]))
        kinds.append(found.setdefault(looks, len(found)))
    return tuple(kinds)


def _tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(), *layer.named_buffers()]


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a causal language model without values, from its transformers configuration alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    return model


__all__ = ["Outline", "empty_model"]
