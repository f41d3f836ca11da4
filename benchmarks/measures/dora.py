"""DoRA's training step, beside peft's and beside plain LoRA's."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measures.training import TOLERANCE
from benchmarks.models import Call, adapt, adapted, call_chain, call_llama, chain, llama, step, with_frozen
from benchmarks.suite import FROZEN, LORICA, PEFT, Case, Contest, measure
from lorica.bench.counting import QUANTITIES
from lorica.bench.timing import Task

#: One more side: lorica's plain LoRA with as many factors.
PLAIN = "lorica's LoRA"


def build(
    quick: bool, *, whole_model: bool = True, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> Contest:
    """Return the contest of a training step of a small Llama, or of one linear of width 1024 (quick: 256)."""
    if whole_model:
        layers, width, tokens = (2, 128, 64) if quick else (4, 512, 128)
        base, call, shape = llama(layers, width, dtype), call_llama, (2, tokens, width)
    else:
        width, tokens = (256, 128) if quick else (1024, 512)
        base, call, shape = chain(1, width, dtype), call_chain, (1, tokens, width)
    return contest_of(
        base,
        call,
        torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)),
        rounds=6 if quick else 40,
        tolerance=None if dropout else TOLERANCE[dtype],
        lora_dropout=dropout,
    )


def contest_of(
    base: nn.Module, call: Call, x: Tensor, *, rounds: int, tolerance: float | None, **fields: Any
) -> Contest:
    """Return the contest of a training step of ``base`` with DoRA, and with plain LoRA as one more side."""
    models = with_frozen(base, adapted(base, use_dora=True, **fields))
    models[PLAIN] = adapt(LORICA, copy.deepcopy(base), init_lora_weights=False, **fields)
    for model in models.values():
        model.train()
    return Contest(
        tasks={side: _writing(model, step(model, call, x)) for side, model in models.items()},
        rounds=rounds,
        counts=QUANTITIES,
        models=models,
        tolerance=tolerance,
    )


def _writing(model: nn.Module, task: Task) -> Task:
    """Return the same with an optimiser's step, so that nothing is kept of norms from one step to the next."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return task
    optimiser = torch.optim.SGD(trained, lr=0.0, foreach=True)

    def run() -> object:
        y = task.run()
        optimiser.step()
        return y

    return Task(run, task.reset)


@measure("dora", "DoRA: training step", sides=(FROZEN, PEFT, LORICA, PLAIN))
def dora() -> list[Case]:
    """Forward, backward and a step of SGD (of rate 0, for the writing), rank 16: one linear 1024 → 1024 with 512
    tokens, and a Llama of 4 layers of width 512 with 2 × 128 tokens. Lorica's plain LoRA of the same rank stands beside
    it. With dropout the two libraries differ: peft computes the base product of the dropped input as well."""
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32, dropout 0.05": {"dropout": 0.05},
        "bf16 base, fp32 factors": {"dtype": torch.bfloat16},
        "bf16 base, fp32 factors, dropout 0.05": {"dtype": torch.bfloat16, "dropout": 0.05},
    }
    return [
        Case(f"{name}: {kind}", partial(build, whole_model=whole_model, **fields))
        for name, whole_model in (("one linear", False), ("Llama", True))
        for kind, fields in kinds.items()
    ]
