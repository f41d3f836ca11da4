"""A training step of a Llama whose MLPs are computed as one each, beside the same with its layers one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import lorica
from benchmarks.measures.training import TOLERANCE
from benchmarks.models import adapted, call_llama, llama, step, with_frozen
from benchmarks.suite import FROZEN, LORICA, PEFT, Case, Contest, measure, quiet
from lorica.bench.counting import QUANTITIES
from lorica.bench.sides import twin

#: lorica without fusing.
SINGLE = "not fused"


def build(quick: bool, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, mlp_alone: bool = False) -> Contest:
    """Return the contest: 4 layers of width 512, 256 tokens; quick: 2 layers of width 128, 128 tokens."""
    layers, width, tokens = (2, 128, 64) if quick else (4, 512, 128)
    base: nn.Module = llama(1 if mlp_alone else layers, width, dtype)
    base = base.layers[0].mlp if mlp_alone else base  # type: ignore[union-attr,index]
    names = ["gate_proj", "up_proj", "down_proj"] if mlp_alone else "all-linear"
    models = with_frozen(base, adapted(base, target_modules=names, lora_dropout=dropout))
    models = {**models, SINGLE: twin(models[LORICA])}
    with quiet():
        lorica.fuse_mlps(models[LORICA])
    x = torch.randn(2, tokens, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for model in models.values():
        model.train()
    call = (lambda model, x: model(x)) if mlp_alone else call_llama
    return Contest(
        tasks={side: step(models[side], call, x) for side in (FROZEN, PEFT, SINGLE, LORICA)},
        rounds=6 if quick else 40,
        counts=QUANTITIES,
        models=models,
        tolerance=None if dropout else TOLERANCE[dtype],
    )


@measure(
    "gated", "Gated MLPs in one piece: forward and backward of a small Llama", sides=(FROZEN, PEFT, SINGLE, LORICA)
)
def gated() -> list[Case]:
    """The Llama of the training step, and one of its MLPs alone (width 512, 1408 inside, 256 tokens); rank 16 on every
    linear. `lorica` is after `lorica.fuse_mlps`, `not fused` the same model without it."""
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32, dropout 0.05": {"dropout": 0.05},
        "bf16 base, fp32 factors": {"dtype": torch.bfloat16},
    }
    cases = [Case(name, partial(build, **fields)) for name, fields in kinds.items()]
    return [*cases, *(Case(f"one MLP, {name}", partial(build, mlp_alone=True, **f)) for name, f in kinds.items())]
