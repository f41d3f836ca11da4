"""Stacked experts with an adapter for each: a block of a mixture, trained and decoding."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.measures.training import TOLERANCE
from benchmarks.models import adapted, forward, step, with_frozen
from benchmarks.suite import Case, Contest, measure
from lorica.bench.counting import QUANTITIES

#: Experts → those of a token, and their inner width beside the model's: Mixtral 8x7B and OLMoE 1B-7B.
SHAPES: dict[int, tuple[int, float]] = {8: (2, 3.5), 64: (8, 0.5)}
#: How transformers may compute them, where both libraries can.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Mixture(nn.Module):
    """One block of a mixture of experts, router included, as transformers has it."""

    def __init__(self, experts: int, implementation: str, width: int, inner: int, top_k: int) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=width, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=top_k
        )
        config._experts_implementation = implementation
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, tokens, width]``."""
        y: Tensor = self.mlp(x)
        return y


def call(model: nn.Module, x: Tensor) -> Tensor:
    """Run a :class:`Mixture`."""
    y: Tensor = model(x)
    return y


def build(
    quick: bool,
    *,
    experts: int,
    implementation: str,
    tokens: int,
    train: bool,
    width: int = 512,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Contest:
    """Return the contest of a block of a mixture.

    Args:
        quick: fewer rounds.
        experts: a key of :data:`SHAPES`.
        implementation: one of :data:`IMPLEMENTATIONS`.
        tokens: of the batch.
        train: forward and backward; otherwise a forward without autograd.
        width: of the model.
        dtype: of the base weights and the input.
        fields: of both configurations, in place of rank 8 on both stacks.
    """
    top_k, inner = SHAPES[experts]
    torch.manual_seed(0)
    base = Mixture(experts, implementation, width, int(inner * width), top_k).to(dtype)
    wanted = {"r": 8, "target_modules": [], "target_parameters": STACKS, **fields}
    models = with_frozen(copy.deepcopy(base), adapted(base, **wanted))
    x = torch.randn(1, tokens, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    task = step if train else forward
    return Contest(
        tasks={side: task(model.train(), call, x) for side, model in models.items()},
        rounds=8 if quick else 60,
        counts=QUANTITIES if train else tuple(name for name in QUANTITIES if name != "saved bytes"),
        models=models,
        tolerance=TOLERANCE[dtype],
    )


def _cases(train: bool, tokens: int, implementations: tuple[str, ...]) -> list[Case]:
    kind = "training" if train else "decoding"
    return [
        Case(
            f"{kind}, {experts} experts, {implementation}",
            partial(build, experts=experts, implementation=implementation, tokens=tokens, train=train),
        )
        for experts in SHAPES
        for implementation in implementations
    ]


@measure("experts", "Experts: a block of a mixture, with an adapter for each expert")
def experts() -> list[Case]:
    """One block of Qwen3-MoE, router included, width 512: 8 experts of inner width 1792, 2 for a token (Mixtral 8x7B
    scaled down by 8), and 64 of inner width 256, 8 for a token (OLMoE 1B-7B by 4). Rank 8 for each expert, on
    `gate_up_proj` and `down_proj` (`target_parameters`). Training: 256 tokens, forward and backward. Decoding: one
    token, without autograd. transformers computes experts one by one (`eager`), sorted (`grouped_mm`, its default) or
    with a copy of a weight for each token (`batched_mm`, meant for decoding on other devices). peft adds the delta of
    all experts to their stack in each forward; lorica adds each routed token's part to its product. So peft's cost goes
    by the stack and lorica's by the tokens, and the ratio rises with the tokens that an expert gets, as in the last
    case. Saved bytes are those of the block and the adapters together."""
    many = partial(build, experts=64, implementation="grouped_mm", tokens=1024, train=True)
    cases = [*_cases(True, 256, ("eager", "grouped_mm")), *_cases(False, 1, IMPLEMENTATIONS)]
    return [*cases, Case("training, 64 experts, grouped_mm, 1024 tokens", many)]
