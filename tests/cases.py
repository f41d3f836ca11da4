"""The operations that can be adapted, one list for the parity tests and the laws.

An :class:`Op` names one kind of base layer: how to build a network around it, what goes in, and what the operation
cannot do by its nature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models import VOCABULARY, floats, ids, transformers_conv1d


class Shift(nn.Module):
    """A frozen-by-default bias outside every target, so that ``bias="all"`` has something to find."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Probe(nn.Module):
    """One target and a shift behind it."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.tail = Shift()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.target(x))


class AttentionProbe(Probe):
    """Self-attention as the target."""

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.target(x, x, x, need_weights=False)[0])


@dataclass(frozen=True)
class Op:
    """One kind of base layer.

    ``fields`` are config fields that the layer needs. ``ranks`` are ranks it accepts. The flags say what the operation
    can do: carry a ``lora_bias``, take ``lora_dropout``, be merged; ``peft_exact`` is False where PEFT's own forward is
    not ``W + ΔW`` (it adds the delta of attention's output projection twice), so that a dense oracle judges alone.
    """

    name: str
    layer: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    net: type[Probe] = Probe
    fields: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (1, 4, 8)
    lora_bias: bool = True
    dropout: bool = True
    mergeable: bool = True
    peft_exact: bool = True

    def build(self, seed: int = 0) -> nn.Module:
        """The network, in evaluation mode."""
        torch.manual_seed(seed)
        return self.net(self.layer()).eval()

    def config(self, library: Any, **fields: Any) -> Any:
        """A ``LoraConfig`` of ``library`` that adapts the target with random factors."""
        merged = {"target_modules": ["target"], "init_lora_weights": False, "r": 4, "lora_alpha": 6}
        return library.LoraConfig(**{**merged, **self.fields, **fields})

    @property
    def differentiable_input(self) -> bool:
        """Whether the input is floating point."""
        return self.inputs().is_floating_point()


_attention = partial(nn.MultiheadAttention, 12, 3)

OPS = [
    Op("linear", lambda: nn.Linear(12, 10), lambda: floats(3, 12)),
    Op("linear-no-bias", lambda: nn.Linear(12, 10, bias=False), lambda: floats(2, 3, 12), lora_bias=False),
    Op("linear-4d", lambda: nn.Linear(6, 9), lambda: floats(2, 2, 3, 6)),
    Op(
        "transformers-conv1d",
        lambda: transformers_conv1d(10, 12),
        lambda: floats(2, 5, 12),
        fields={"fan_in_fan_out": True},
    ),
    Op("embedding", lambda: nn.Embedding(VOCABULARY, 9), lambda: ids(2, 7), lora_bias=False, dropout=False),
    Op(
        "embedding-padded",
        lambda: nn.Embedding(VOCABULARY, 9, padding_idx=1),
        lambda: ids(2, 7),
        lora_bias=False,
        dropout=False,
    ),
    Op(
        "embedding-by-frequency",
        lambda: nn.Embedding(VOCABULARY, 9, scale_grad_by_freq=True),
        lambda: ids(2, 7),
        lora_bias=False,
        dropout=False,
    ),
    Op("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: floats(2, 4, 9)),
    Op("conv1d-grouped", lambda: nn.Conv1d(4, 8, 3, groups=4), lambda: floats(2, 4, 9), ranks=(4, 8), mergeable=False),
    Op("conv2d", lambda: nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 0)), lambda: floats(2, 3, 8, 9)),
    Op("conv2d-same", lambda: nn.Conv2d(3, 8, 3, padding="same"), lambda: floats(2, 3, 6, 7)),
    Op("conv2d-1x1", lambda: nn.Conv2d(5, 8, 1), lambda: floats(2, 5, 4, 4)),
    Op(
        "conv2d-grouped",
        lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1),
        lambda: floats(2, 4, 6, 6),
        ranks=(4, 8),
        mergeable=False,
    ),
    Op("conv2d-no-bias", lambda: nn.Conv2d(3, 8, 3, bias=False), lambda: floats(2, 3, 6, 6), lora_bias=False),
    Op("conv3d", lambda: nn.Conv3d(2, 6, 2, stride=(1, 2, 1), padding=(0, 1, 0)), lambda: floats(2, 2, 4, 5, 3)),
    Op(
        "attention",
        _attention,
        lambda: floats(5, 2, 12),
        net=AttentionProbe,
        lora_bias=False,
        dropout=False,
        peft_exact=False,
    ),
    Op(
        "attention-batch-first",
        partial(_attention, batch_first=True, bias=False),
        lambda: floats(2, 5, 12),
        net=AttentionProbe,
        lora_bias=False,
        dropout=False,
        peft_exact=False,
    ),
]

# PEFT leaves dilation and padding_mode out of its convolutions, so only the oracle can judge these.
DILATED = [
    Op("conv1d-dilated", lambda: nn.Conv1d(4, 6, 3, dilation=2), lambda: floats(2, 4, 9), peft_exact=False),
    Op(
        "conv2d-dilated",
        lambda: nn.Conv2d(3, 8, 3, dilation=(2, 1), padding=2),
        lambda: floats(2, 3, 9, 8),
        peft_exact=False,
    ),
    Op(
        "conv2d-circular",
        lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        lambda: floats(2, 3, 6, 6),
        peft_exact=False,
    ),
    Op(
        "conv3d-dilated",
        lambda: nn.Conv3d(2, 6, 2, dilation=(1, 2, 2)),
        lambda: floats(2, 2, 4, 5, 5),
        peft_exact=False,
    ),
]
