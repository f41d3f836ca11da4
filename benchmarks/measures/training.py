"""A training step of a small Llama, beside its frozen base."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.models import adapted, call_llama, llama, step, with_frozen
from benchmarks.suite import Case, Contest, measure
from lorica.bench.counting import QUANTITIES

#: How far the two libraries may lie apart: peft computes the low-rank part of a bf16 layer in fp32, lorica in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def build(quick: bool, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Contest:
    """Return the contest: 4 layers of width 512, 256 tokens; quick: 2 layers of width 128, 128 tokens."""
    layers, width, tokens = (2, 128, 64) if quick else (4, 512, 128)
    base = llama(layers, width, dtype)
    models = with_frozen(base, adapted(base, lora_dropout=dropout))
    x = torch.randn(2, tokens, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for model in models.values():
        model.train()
    return Contest(
        tasks={side: step(model, call_llama, x) for side, model in models.items()},
        rounds=6 if quick else 40,
        counts=QUANTITIES,
        models=models,
        tolerance=None if dropout else TOLERANCE[dtype],
    )


@measure("training", "Training step: forward and backward of a small Llama")
def training() -> list[Case]:
    """4 layers of width 512 (28 linears), 2 × 128 tokens, rank 16 on every linear. With a bf16 base both libraries hold
    the factors in fp32 (`autocast_adapter_dtype`); peft then computes the low-rank part in fp32, lorica in bf16. On a
    CPU without bf16 units a product in bf16 is several times slower than in fp32 (compare the frozen base), which the
    time then shows; bytes and kernels do not depend on the CPU."""
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32, dropout 0.05": {"dropout": 0.05},
        "bf16 base, fp32 factors": {"dtype": torch.bfloat16},
        "bf16 base, fp32 factors, dropout 0.05": {"dtype": torch.bfloat16, "dropout": 0.05},
    }
    return [Case(name, partial(build, **fields)) for name, fields in kinds.items()]
