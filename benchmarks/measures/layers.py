"""Single linears and small layers, where the cost is the number of operators and the Python around them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.measures.training import TOLERANCE
from benchmarks.models import adapted, call_chain, call_llama, chain, forward, llama, step, with_frozen
from benchmarks.suite import Case, Contest, measure
from lorica.bench.counting import QUANTITIES


def build_chain(
    quick: bool,
    *,
    layers: int,
    width: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> Contest:
    """Return the contest of a training step of a chain of linears."""
    base = chain(layers, width, dtype)
    models = with_frozen(base, adapted(base, lora_dropout=dropout))
    x = torch.randn(1, tokens, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return Contest(
        tasks={side: step(model.train(), call_chain, x) for side, model in models.items()},
        rounds=20 if quick else 200,
        counts=QUANTITIES,
        models=models,
        tolerance=None if dropout else TOLERANCE[dtype],
    )


def build_decode(quick: bool, *, whole_model: bool) -> Contest:
    """Return the contest of a forward of one token without autograd."""
    if whole_model:
        base, call = llama(2 if quick else 4, 256), call_llama
    else:
        base, call = chain(8, 256), call_chain
    models = with_frozen(base, adapted(base))
    x = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(1))
    return Contest(
        tasks={side: forward(model, call, x) for side, model in models.items()},
        rounds=20 if quick else 200,
        counts=("FLOPs", "kernels", "bytes moved", "peak bytes"),
        models=models,
        tolerance=TOLERANCE[torch.float32],
    )


@measure("linear", "One linear: forward and backward")
def linear() -> list[Case]:
    """1024 → 1024 with a ReLU behind it, 512 tokens, rank 16."""
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32, dropout 0.05": {"dropout": 0.05},
        "bf16 base, fp32 factors": {"dtype": torch.bfloat16},
        "bf16 base, fp32 factors, dropout 0.05": {"dtype": torch.bfloat16, "dropout": 0.05},
    }
    build = partial(build_chain, layers=1, width=1024, tokens=512)
    return [Case(name, partial(build, **fields)) for name, fields in kinds.items()]


@measure("small", "Small layers: forward and backward")
def small() -> list[Case]:
    """8 linears of width 256, 8 tokens, rank 16: nearly all of the time is dispatching operators, not arithmetic."""
    build = partial(build_chain, layers=8, width=256, tokens=8)
    return [Case("fp32", build), Case("fp32, dropout 0.05", partial(build, dropout=0.05))]


@measure("decode", "Decoding: forward of one token, without autograd")
def decode() -> list[Case]:
    """One adapter of rank 16, not merged; evaluation mode, `torch.no_grad`."""
    return [
        Case("8 linears of width 256", partial(build_decode, whole_model=False)),
        Case("Llama, 4 layers of width 256", partial(build_decode, whole_model=True)),
    ]
