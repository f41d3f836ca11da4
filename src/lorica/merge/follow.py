"""Which stored tensors a model's parameters are made of, by transformers' own conversion of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorica.errors import CheckpointError
from lorica.merge.traced import NotFollowedError, Traced


class Conversion:
    """What transformers does to a checkpoint on the way into a model.

    Args:
        model: the model, on the meta device.
        shapes: name → shape of every stored tensor.

    Attributes:
        parameters: name of a parameter or buffer → what it is made of. Those that the checkpoint lacks are not in it.
        lost: name of a parameter → why it cannot be said what it is made of.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._mapping = get_model_conversion_mapping(model)
        self._renamings = [step for step in self._mapping if isinstance(step, WeightRenaming)]
        self._converters = [step for step in self._mapping if isinstance(step, WeightConverter)]
        self._known: Mapping[str, Any] = model.state_dict()
        self.parameters: dict[str, Traced] = {}
        self.lost: dict[str, str] = {}
        for name, step in self._collect(shapes).items():
            self._convert(name, step)

    def _convert(self, name: str, step: Any) -> None:
        try:
            self.parameters.update(_first(step.convert(name, model=self._model, config=self._model.config)))
        except Exception as error:  # transformers' operations complain in many ways
            targets = [name.replace(step.target_patterns[0], target) for target in step.target_patterns]
            self.lost |= dict.fromkeys(targets, f"{step}: {error}")

    def _collect(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Give each stored tensor to the step that makes parameters of it: name of the first of them → step."""
        from transformers.core_model_loading import WeightRenaming, dot_natural_key

        steps: dict[str, Any] = {}
        by_pattern = {pattern: step for step in self._converters for pattern in step.source_patterns}
        for key in sorted(shapes, key=dot_natural_key):
            name, pattern = self._rename(key)
            if name not in self._known:
                continue  # transformers leaves it unused
            if name not in steps:
                steps[name] = WeightRenaming(key, name) if pattern is None else copy.deepcopy(by_pattern[pattern])
            steps[name].add_tensor(name, key, key if pattern is None else pattern, Traced.stored(key, shapes[key]))
        return steps

    def _rename(self, key: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(
            key, self._renamings, self._converters, self._model.base_model_prefix, self._known
        )
        if name not in self._known and key in self._known:
            name, pattern = rename_source_key(key, [], [], self._model.base_model_prefix, self._known)
        return name, pattern

    def need(self, names: Iterable[str], where: str) -> None:
        """Refuse to go on without knowing what these parameters are made of, of the right shape.

        Raises:
            NotFollowedError: it is not known.
            CheckpointError: the checkpoint has nothing for one, or something of another shape.
        """
        for name in names:
            if name in self.lost:
                raise NotFollowedError(f"{name}: {self.lost[name]}")
            if name not in self.parameters:
                raise CheckpointError(f"{where} has no tensor for {name}, which the adapter changes")
            found, wanted = tuple(self.parameters[name].shape), tuple(self._known[name].shape)
            if found != wanted:
                raise CheckpointError(f"{where}: {name} is {found} there, the model's configuration says {wanted}")

    def stored_name(self, name: str) -> str:
        """Return the name that a parameter which the checkpoint lacks gets there.

        Raises:
            NotFollowedError: it would not be stored as it is.
        """
        from transformers.core_model_loading import revert_weight_conversion

        self._model._weight_conversions = [step for step in self._mapping if step.was_used()]
        value: Any = self._known[name]
        found: dict[str, Any] = revert_weight_conversion(self._model, {name: value})
        if len(found) != 1 or next(iter(found.values())).shape != value.shape:
            raise NotFollowedError(f"{name} would be stored as {sorted(found)}")
        return next(iter(found))


def _first(converted: Mapping[str, Any]) -> dict[str, Traced]:
    """Return what a step made; one of a list, as transformers takes it."""
    values = {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
    if not all(isinstance(value, Traced) for value in values.values()):
        raise NotFollowedError("the result is no tensor whose elements were followed")
    return values


def skeleton(config: Any) -> nn.Module:
    """Return the causal language model of a configuration on the meta device: shapes, no values.

    Raises:
        NotFollowedError: its weights are quantised, so that parameters are no plain tensors.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        raise NotFollowedError("the base model is quantised")
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


__all__ = ["Conversion", "skeleton"]
