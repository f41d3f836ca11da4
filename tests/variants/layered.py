"""What the tests of variants share: every kind of layer, adapted, and a dense oracle for it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import lorica
from cases import OPS, Op
from lorica.layers import LoraLayer

#: Layers of which the delta has a place in the weight.
LAYERS = [op for op in OPS if op.mergeable]
LINEAR = [op for op in LAYERS if op.name.startswith(("linear", "transformers"))]


def by_name(op: Op) -> str:
    return op.name


def adapt(op: Op, **fields: Any) -> nn.Module:
    """An adapted model; the seed says how it starts."""
    torch.manual_seed(1)
    return lorica.get_peft_model(op.build(), op.config(lorica, **fields))


def layer_of(model: nn.Module) -> LoraLayer:
    return model.base_model.model.target


def dense(op: Op, model: nn.Module) -> nn.Module:
    """The base model with ``W + ΔW`` in its weights, the deltas asked of the layers one by one."""
    base = op.build()
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)):
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        weight = getattr(base.get_submodule(path), layer.op.weight_name)
        with torch.no_grad():
            weight.copy_(getattr(layer.get_base_layer(), layer.op.weight_name) + layer.get_delta_weight("default"))
    return base


def merged(model: nn.Module) -> nn.Module:
    """A copy, merged."""
    other = copy.deepcopy(model)
    other.merge_adapter()
    return other


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Equal up to a relative error, by norm."""
    assert actual.shape == expected.shape
    off = float((actual - expected).detach().double().norm() / expected.detach().double().norm())
    assert off <= tolerance, off
