"""The names that a model's own files have for its weights, and which rows of a weight each of them means.

vLLM and SGLang build their models from a checkpoint's names. transformers renames, stacks and fuses on the way in
(``transformers/conversion_mapping.py``) and undoes that on the way out. Here its way out is taken with row numbers in
the place of weights, so that what comes out says of each stored name which rows it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.export.saved import Weight


class Rows(NamedTuple):
    """Some rows of a weight, under the name of a module that has them in a checkpoint.

    Attributes:
        name: the module.
        expert: which of stacked experts; None: the weight is a matrix, or the checkpoint stacks it too.
        rows: their numbers, in the checkpoint's order.
    """

    name: str
    expert: int | None
    rows: Tensor


class CheckpointNames:
    """Names in the files of one model.

    Args:
        base: the model on the meta device.
    """

    def __init__(self, base: Any) -> None:
        self._base = base

    def stored(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """Return what a tensor in the place of a parameter becomes in the model's files; as it is where nobody knows.

        Args:
            parameter: its full name.
            value: of as many dimensions.
        """
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:
            return {parameter: value}
        try:
            found: dict[str, Tensor] = revert_weight_conversion(self._base, {parameter: value})
        except Exception:  # its operations complain in many ways where they miss other parts of what they divide
            return {parameter: value}
        return found

    def matrix(self, weight: Weight) -> list[Rows]:
        """Return the modules that a linear layer or an embedding is in the files: itself, or those it was fused of."""
        count = weight.op.logical_weight(weight.owner).shape[0]
        numbers = torch.arange(count).view((1, -1) if weight.op.transposed else (-1, 1))
        found = self.stored(weight.name, numbers)
        if sum(part.numel() for part in found.values()) != count or not all(n.endswith(".weight") for n in found):
            return [Rows(weight.module, None, torch.arange(count))]
        return [Rows(name.removesuffix(".weight"), None, part.flatten()) for name, part in found.items()]

    def experts(self, module: str, owner: Any, parameter: str) -> list[Rows]:
        """Return one module for each expert and projection of a stack.

        A stack that the files do not take apart is taken apart by its own layout: a fused gate and up lie one behind
        the other, or in turn where the module says that they are not concatenated (gpt-oss).
        """
        turned = bool(getattr(owner, "is_transposed", False))
        shape = owner._parameters[parameter].shape
        experts, outs = shape[0], shape[2] if turned else shape[1]
        numbers = torch.arange(experts * outs).view(experts, outs, 1)
        found = self.stored(f"{module}.{parameter}", numbers.mT if turned else numbers)
        whole = sum(part.numel() for part in found.values()) == experts * outs
        if whole and len(found) > 1 and all(name.endswith(".weight") for name in found):
            return [
                Rows(name.removesuffix(".weight"), int(part.flatten()[0]) // outs, part.flatten() % outs)
                for name, part in found.items()
            ]
        place = self.stack(module, parameter)
        parts = _projections(owner, parameter, outs)
        return [Rows(f"{place}.{e}.{name}", e, rows) for e in range(experts) for name, rows in parts.items()]

    def stack(self, module: str, parameter: str) -> str:
        """Return the name of the module of a stack in the files, without a number of an expert."""
        found = self.stored(f"{module}.{parameter}", torch.zeros(1, 1, 1, dtype=torch.long))
        name = next(iter(found))
        if len(found) != 1 or ".experts." not in name:
            return module
        return name[: name.rindex(".experts.") + len(".experts")]


def _projections(owner: Any, parameter: str, outs: int) -> dict[str, Tensor]:
    rows = torch.arange(outs)
    if parameter != "gate_up_proj":
        return {parameter: rows}
    if getattr(owner, "is_concatenated", True):
        return {"gate_proj": rows[: outs // 2], "up_proj": rows[outs // 2 :]}
    return {"gate_proj": rows[::2], "up_proj": rows[1::2]}


def stacks_of(owner: Any) -> Iterable[str]:
    """Return the names of a module's parameters that stack its experts' weights."""
    return [name for name, parameter in owner._parameters.items() if parameter is not None and parameter.dim() == 3]
