"""The base layers of the table of features, each in the smallest network that has it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from harness import dense, grouped
from torch import Tensor, nn
from torch.func import functional_call

import cases
import lorica
import mixtures
import quantised_layers
from cases import AttentionProbe, Probe
from lorica.engines.native import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
)
from lorica.engines.site import Axis
from models import VOCABULARY, floats, ids

#: An axis of one rank: native layers compute on it what they compute on many, and send nothing.
_ALONE = Axis("tp", 1, 0, None)
_PREFIX = "base_model.model."

Expected = Callable[[nn.Module, nn.Module, Tensor, float], Tensor]


@dataclass(frozen=True)
class Layer:
    """One column of the table.

    Attributes:
        name: its heading.
        build: a network with the layer in it, in float32.
        batch: an input of it.
        fields: of the config, that say what is adapted.
        expected: what the adapted network gives, from base network, factors, input and scale, in dense arithmetic.
        double: whether it can be had in float64; otherwise it is judged in float32.
        off: how far off an output may be; 0: to the rounding of its dtype.
        merged: how far off a merged network may be; 0: as its output.
        there: whether what it needs is installed.
        stands_for: entries of the registries that it covers.
        given: what an adapted network is given beside its input.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    expected: Expected
    fields: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": ["target"]})
    double: bool = True
    off: float = 0.0
    merged: float = 0.0
    there: bool = True
    stands_for: tuple[Any, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """In which it is judged."""
        return torch.float64 if self.double else torch.float32

    @property
    def tolerance(self) -> float:
        """How far off an output may be."""
        return self.off or (1e-9 if self.double else 2e-4)

    @property
    def r(self) -> int:
        """The rank that it is adapted with."""
        return self.fields.get("r", 4)

    def base(self) -> nn.Module:
        """The network, in evaluation mode; the same one every time."""
        network = copy.deepcopy(_built(self.build))
        # Frozen, as an adapted one is: torch's attention computes in another way where nothing can train.
        return (network.double() if self.double else network).eval().requires_grad_(False)

    def config(self, **fields: Any) -> Any:
        """A config that adapts the layer."""
        return lorica.LoraConfig(**{"r": self.r, "lora_alpha": 6, "init_lora_weights": False, **self.fields, **fields})

    def adapt(self, base: nn.Module, **fields: Any) -> nn.Module:
        """A copy of a network, adapted."""
        torch.default_generator.manual_seed(1)  # what torch.manual_seed notes for other devices takes longer
        model = lorica.get_peft_model(copy.deepcopy(base), self.config(**fields))
        return (model.double() if self.double else model).eval()

    def run(self, model: nn.Module, batch: Tensor | None = None, **options: Any) -> Tensor:
        """The output of a network."""
        batch = self.batch() if batch is None else batch
        x = batch.double() if self.double and batch.is_floating_point() else batch
        if isinstance(model, lorica.PeftModel):
            options = {**self.given, **options}
        output: Any = model(x, **options)
        return getattr(output, "logits", output)


@functools.lru_cache(maxsize=64)
def _built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return build()


def _factors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    state = lorica.get_peft_model_state_dict(model)
    return {name.removeprefix(_PREFIX): tensor.to(dtype) for name, tensor in state.items()}


def _dense(base: nn.Module, model: nn.Module, batch: Tensor, scale: float) -> Tensor:
    return dense(base, model, scale)(batch)


def _grouped(base: nn.Module, model: nn.Module, batch: Tensor, scale: float) -> Tensor:
    bias = _factors(model, batch.dtype).get("target.lora_B.bias")
    output = grouped(base, model, scale, batch)
    return output if bias is None else output + scale * bias[:, None, None]


def _attention(base: nn.Module, model: nn.Module, batch: Tensor, scale: float) -> Tensor:
    oracle, found = dense(base, model, scale), _factors(model, batch.dtype)
    for path, bias in ("", oracle.target.in_proj_bias), (".base_layer.out_proj", oracle.target.out_proj.bias):
        bias.data += scale * found.get(f"target{path}.lora_B.bias", torch.zeros(()))
    return oracle(batch)


def _beside(base: nn.Module, model: nn.Module, batch: Tensor, scale: float) -> Tensor:
    """``y + s·(x Aᵀ) Bᵀ`` (and s times the bias of B), for weights whose numbers are not at hand."""
    found = _factors(model, batch.dtype)
    parts = [name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")]
    added = torch.cat([batch @ found[f"{p}.lora_A.weight"].T @ found[f"{p}.lora_B.weight"].T for p in parts], -1)
    biases = [found[f"{p}.lora_B.bias"] for p in parts if f"{p}.lora_B.bias" in found]
    return base(batch) + scale * (added + torch.cat(biases) if biases else added)


def _in_stacks(base: nn.Module, model: nn.Module, batch: Tensor, scale: float) -> Tensor:
    weights = dict(base.named_parameters())
    changed = {name: weights[name] + delta for name, delta in mixtures.deltas(model).items()}
    return functional_call(base, changed, (batch,)).logits


class QKV(nn.Module):
    """q, k and v in one native weight, joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.target = GQAQKVColumnParallelLinear(16, (16, 8), axis=_ALONE, head_dim=4, fuse_qkv=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.target(x), -1)


def _op(name: str) -> cases.Op:
    return next(op for op in cases.OPS if op.name == name)


def _of(heading: str, name: str | cases.Op, *stands_for: Any, expected: Expected = _dense, **options: Any) -> Layer:
    op = name if isinstance(name, cases.Op) else _op(name)
    fields = {"target_modules": ["target"], **op.fields}
    return Layer(heading, op.build, op.inputs, expected, fields, stands_for=stands_for, **options)


def _moe(kind: str, parameters: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "build": lambda: mixtures.moe(kind, implementation="eager", num_hidden_layers=1),
        "batch": lambda: ids(2, 7),
        "expected": _in_stacks,
        "fields": {"target_modules": [], "target_parameters": parameters, **fields},
    }


def _native(heading: str, make: Callable[[], nn.Module], batch: Callable[[], Tensor], *stands_for: Any) -> Layer:
    return Layer(heading, lambda: Probe(make()), batch, _dense, stands_for=stands_for)


def _quantised(name: str, merged: float, *stands_for: str) -> Layer:
    def build() -> nn.Module:
        return Probe(quantised_layers.KINDS[name](quantised_layers.dense()))

    try:
        there = build() is not None
    except pytest.skip.Exception:
        there = False
    return Layer(
        name,
        build,
        lambda: floats(3, quantised_layers.IN),
        _beside,
        double=False,
        off=quantised_layers.ROUND_INPUTS.get(name, 2e-4),
        merged=merged,
        there=there,
        stands_for=stands_for,
    )


_BNB, _AO = "bitsandbytes.nn.modules", "torchao.utils.TorchAOBaseTensor"
_GPTQ = "gptqmodel.nn_modules.qlinear"
_INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
_BATCH_FIRST = cases.Op(
    "attention",
    lambda: nn.MultiheadAttention(12, 3, batch_first=True),
    lambda: floats(2, 5, 12),
    net=AttentionProbe,
)
_CONV2D = cases.Op("conv2d", lambda: nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 0)), lambda: floats(2, 4, 8, 9))
_CONV3D = cases.Op(
    "conv3d", lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=(0, 1, 0)), lambda: floats(2, 4, 4, 5, 3)
)
LAYERS = [
    _of("`nn.Linear`", "linear", nn.Linear),
    _of("`Conv1D` (transformers)", "transformers-conv1d", "transformers.pytorch_utils.Conv1D"),
    _of("`nn.Embedding`", "embedding", nn.Embedding),
    _of("`nn.Conv1d`", "conv1d", nn.Conv1d),
    _of("`nn.Conv2d`", _CONV2D, nn.Conv2d),
    _of("`nn.Conv3d`", _CONV3D, nn.Conv3d),
    _of("`nn.Conv2d`, groups", "conv2d-grouped", expected=_grouped),
    _of("`nn.MultiheadAttention`", _BATCH_FIRST, nn.MultiheadAttention, expected=_attention),
    Layer("experts, own", **_moe("qwen3_moe", mixtures.STACKS)),
    Layer("experts, shared", **_moe("qwen3_moe", mixtures.STACKS, share_expert_adapters=True)),
    Layer("experts `[E, in, out]`", **_moe("gpt_oss", mixtures.STACKS)),
    Layer("bare matrix", **_moe("qwen3_moe", ["mlp.gate.weight"], r=2)),
    _native(
        "native column", lambda: ColumnParallelLinear(12, 10, axis=_ALONE), lambda: floats(3, 12), ColumnParallelLinear
    ),
    _native("native row", lambda: RowParallelLinear(12, 10, axis=_ALONE), lambda: floats(3, 12), RowParallelLinear),
    _native(
        "native embedding", lambda: ParallelEmbedding(VOCABULARY, 9, axis=_ALONE), lambda: ids(2, 7), ParallelEmbedding
    ),
    Layer("native fused q, k, v", QKV, lambda: floats(2, 3, 16), _beside, {"target_modules": ["qkv_proj"]}),
    _quantised("bitsandbytes int8", 0.1, f"{_BNB}.Int8Params"),
    _quantised("bitsandbytes nf4", 0.3, f"{_BNB}.Params4bit"),
    _quantised("bitsandbytes fp4", 0.4, f"{_BNB}.Params4bit"),
    _quantised("torchao int8", 0.1, _AO),
    _quantised("torchao int8 and activations", 0.1, _AO),
    _quantised("torchao float8", 0.1, _AO),
    _quantised("torchao int4 in groups", 0.3, _AO),
    _quantised("HQQ", 0.3, "hqq.core.quantize.HQQLinear"),
    _quantised("AQLM", 0.3, "aqlm.inference.QuantizedLinear"),
    _quantised("GPTQ, a stand-in", 0.3, f"{_GPTQ}.BaseQuantLinear"),
    _quantised("AWQ, a stand-in", 0.3, f"{_GPTQ}.AWQuantLinear"),
    _quantised("EETQ, a stand-in", 0.3, "transformers.integrations.eetq.EetqLinear", "eetq.modules.qlinear.EetqLinear"),
    _quantised("INC, a stand-in", 0.3, f"{_INC}.PatchedLinear"),
]
