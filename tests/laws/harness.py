"""What the laws share: adapted models, their factors, and the dense oracle that judges them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from cases import DILATED, OPS, Op
from models import randomise

ALL_OPS = [*OPS, *DILATED]
MERGEABLE = [op for op in ALL_OPS if op.mergeable]
TARGET = "base_model.model.target"


def by_name(op: Op) -> str:
    """The id of a parametrised operation."""
    return op.name


def adapt(base: nn.Module, op: Op, **fields: Any) -> nn.Module:
    """A copy of ``base`` with an adapter of random factors, in evaluation mode."""
    keep_init = "init_lora_weights" in fields
    model = lorica.get_peft_model(copy.deepcopy(base), op.config(lorica, **fields)).eval()
    return model if keep_init else randomise(model)


def batch_of(op: Op, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inputs of an operation, floats in ``dtype``."""
    batch = op.inputs()
    return batch.to(dtype) if batch.is_floating_point() else batch


def zero_b(model: nn.Module) -> nn.Module:
    """Set every B to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.zero_()
    return model


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything but the adapters' own parameters, under the names of the base model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).replace("base_layer.", ""): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored ``[in, out]``."""
    return isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"


def dense(base: nn.Module, model: nn.Module, scale: float) -> nn.Module:
    """A copy of ``base`` with ``s·B·A`` added to its dense weights, from the factors that ``model`` would save."""
    oracle = copy.deepcopy(base)
    factors = lorica.get_peft_model_state_dict(model)
    kind = "embedding_" if isinstance(oracle.target, nn.Embedding) else ""
    suffix = "" if kind else ".weight"

    def grow(path: str, weight: nn.Parameter, turn: bool) -> None:
        a, b = (factors[f"{TARGET}{path}.lora_{kind}{name}{suffix}"].to(weight.dtype) for name in "AB")
        change = (b @ a).T if turn else torch.einsum("or,ri...->oi...", b.flatten(1), a)
        weight.data += scale * change

    if isinstance(oracle.target, nn.MultiheadAttention):
        grow("", oracle.target.in_proj_weight, False)
        grow(".base_layer.out_proj", oracle.target.out_proj.weight, False)
        return oracle
    grow("", oracle.target.weight, transposed(oracle.target))
    bias = factors.get(f"{TARGET}.lora_B.bias")
    if bias is not None:
        oracle.target.bias.data += scale * bias
    return oracle


def grouped(base: nn.Module, model: nn.Module, scale: float, batch: Tensor) -> Tensor:
    """The output of a grouped convolution: A sees all input channels, B is grouped like the base layer."""
    layer = base.target
    factors = lorica.get_peft_model_state_dict(model)
    a, b = (factors[f"{TARGET}.lora_{name}.weight"].to(batch.dtype) for name in "AB")
    convolve = {3: F.conv1d, 4: F.conv2d}[a.dim()]
    low = convolve(batch, a, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    return base.tail(layer(batch) + scale * convolve(low, b, groups=layer.groups))


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, type]]]:
    """Everything that a refused operation must leave alone: tensors, and the class of every module."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return tensors, [(name, type(module)) for name, module in model.named_modules()]


def assert_unchanged(model: nn.Module, before: tuple[dict[str, Tensor], list[tuple[str, type]]]) -> None:
    """``model`` is what it was at :func:`state_of`, bit for bit."""
    tensors, classes = state_of(model)
    assert classes == before[1]
    assert list(tensors) == list(before[0])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[0][name]), name


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm-wise relative difference within ``tolerance``."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    assert difference <= tolerance * expected.detach().double().norm(), float(difference)
