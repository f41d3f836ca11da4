"""Quantised linear layers of every kind, made by the packages themselves, and stand-ins for those that are not here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says for every product that inputs go through float16

OUT, IN = 96, 128


def dense(out: int = OUT, inputs: int = IN, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear layer whose bias is no multiple of its outputs."""
    layer = nn.Linear(inputs, out, bias=bias)
    if bias:
        nn.init.normal_(layer.bias)
    return layer.to(dtype)


def bnb8(layer: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def bnb4(layer: nn.Linear, kind: str = "nf4", *, double: bool = True, storage: torch.dtype = torch.uint8) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    has_bias, dtype = layer.bias is not None, layer.weight.dtype
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        has_bias,
        quant_type=kind,
        compress_statistics=double,
        quant_storage=storage,
    ).to(dtype)
    weight = bnb.nn.Params4bit(
        layer.weight.detach().clone(), quant_type=kind, compress_statistics=double, quant_storage=storage, module=made
    )
    made.weight = weight
    if has_bias:
        made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return made.to("cpu")


def torchao(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        chosen = {key: value(quantization) if callable(value) else value for key, value in options.items()}
        holder = nn.Sequential(layer)
        quantization.quantize_(holder, getattr(quantization, name)(**chosen))
        return holder[0]

    return make


def hqq(layer: nn.Linear, axis: int = 1) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", exc_type=ImportError)
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
    with torch.no_grad():  # scales that remember where they come from cannot be copied
        return quantize.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


def gptq(layer: nn.Linear, group: int = 32) -> nn.Module:
    torch_ = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", exc_type=ImportError)
    return _packed(torch_.TorchLinear, layer, group)


def awq(layer: nn.Linear, group: int = 32) -> nn.Module:
    torch_ = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq", exc_type=ImportError)
    return _packed(torch_.AwqTorchLinear, layer, group)


def _packed(cls: Any, layer: nn.Linear, group: int) -> nn.Module:
    made = cls(
        bits=4, group_size=group, sym=True, desc_act=False, in_features=layer.in_features,
        out_features=layer.out_features, bias=layer.bias is not None, register_buffers=False,
    )  # fmt: skip
    scales = layer.weight.detach().view(layer.out_features, -1, group).abs().amax(-1) / 7
    args = (torch.arange(layer.in_features) // group,) if cls.__name__ == "TorchLinear" else ()
    made.pack(layer, scales, torch.full_like(scales, 8), *args)
    made.post_init()
    for name, buffer in list(made.named_buffers()):  # packing leaves inference tensors, loading does not
        setattr(made, name, buffer.clone())
    return made


def aqlm(layer: nn.Linear) -> nn.Module:
    package = pytest.importorskip("aqlm", exc_type=ImportError)
    pytest.importorskip("numba", exc_type=ImportError)
    made = package.QuantizedLinear(layer.in_features, layer.out_features, 8, 1, 2, 8, bias=layer.bias is not None)
    made.codebooks.data.normal_()
    made.scales.data.uniform_(0.5, 1)
    made.codes.data.random_(-128, 127)
    if layer.bias is not None:
        made.bias.data.copy_(layer.bias.detach())
    return made


class _StandIn(nn.Module):
    """The interface of a linear layer that lorica only reads: names, shapes and a forward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1) / 127
        numbers = (layer.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.keep(numbers, scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        raise NotImplementedError

    def values(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.values().to(x.dtype).T
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _Eetq(_StandIn):
    """``EetqLinear``: ``weight`` ``[in, out]`` and ``weight_scales``."""

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(numbers.T.contiguous(), requires_grad=False)
        self.weight_scales = nn.Parameter(scale, requires_grad=False)

    def values(self) -> Tensor:
        return (self.weight * self.weight_scales).T


class _Gptq(_StandIn):
    """``BaseQuantLinear``: ``qweight``, ``scales`` and ``dequantize_weight()``, which gives ``[in, out]``."""

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        self.register_buffer("qweight", numbers.T.contiguous())
        self.register_buffer("scales", scale[None])

    def dequantize_weight(self) -> Tensor:
        return self.qweight * self.scales

    def values(self) -> Tensor:
        return self.dequantize_weight().T


class _Patched(_StandIn):
    """``PatchedLinear``: ``weight`` ``[in, out]`` of float8, a scale."""

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter((numbers / 127).T.to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale_weight", scale * 127)

    def values(self) -> Tensor:
        return (self.weight.float() * self.scale_weight).T


def stand_in(cls: type[_StandIn], module: str, name: str) -> Callable[[nn.Linear], nn.Module]:
    """A class of the package's name, found by it alone."""
    named = type(name, (cls,), {"__module__": module, "__qualname__": name})
    return lambda layer: named(layer)


#: Written and read: made by their packages.
WRITTEN: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes int8": bnb8,
    "bitsandbytes nf4": bnb4,
    "bitsandbytes nf4, scales plain": lambda layer: bnb4(layer, double=False),
    "bitsandbytes nf4 in bfloat16": lambda layer: bnb4(layer, storage=torch.bfloat16),
    "bitsandbytes fp4": lambda layer: bnb4(layer, "fp4"),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 and activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao int4 in groups": torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda q: q.PerGroup(32)
    ),
    "HQQ": hqq,
    "HQQ, other axis": lambda layer: hqq(layer, 0),
}
_GPTQ = "gptqmodel.nn_modules.qlinear"
#: Read and not written: of their packages where they are here, and stand-ins.
READ: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "GPTQ": gptq,
    "AWQ": awq,
    "AQLM": aqlm,
    "GPTQ, a stand-in": stand_in(_Gptq, _GPTQ, "BaseQuantLinear"),
    "AWQ, a stand-in": stand_in(_Gptq, _GPTQ, "AWQuantLinear"),
    "EETQ, a stand-in": stand_in(_Eetq, "transformers.integrations.eetq", "EetqLinear"),
    "INC, a stand-in": stand_in(
        _Patched, "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules", "PatchedLinear"
    ),
}
KINDS = {**WRITTEN, **READ}
#: Layers that round what goes in as well: their outputs are near the product, not it.
ROUND_INPUTS = {"bitsandbytes int8": 2e-2, "torchao int8 and activations": 2e-2}
HALF = {"GPTQ", "AWQ"}  # their kernels take 16-bit inputs
