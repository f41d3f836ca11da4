"""The same steps under ``torch.compile``: graphs, breaks, and times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measures.training import TOLERANCE
from benchmarks.models import Call, adapted, call_llama, forward, llama, step, with_frozen
from benchmarks.suite import FROZEN, LORICA, PEFT, Case, Contest, Figure, Measure, measure, ratio_of, seed_everything
from lorica.bench.timing import Task

#: What is told of the compiler's work on each side.
GRAPHS, BREAKS = "graphs", "graph breaks"


@dataclass(frozen=True)
class CompiledCase(Case):
    """A case whose models are compiled; how many graphs that took is counted too.

    Attributes:
        explain: gives for each side how many graphs and how many breaks a call has, before anything is compiled.
    """

    explain: Callable[[bool], dict[str, dict[str, float]]] = lambda quick: {}

    def take(self, of: Measure, *, quick: bool, tick: Callable[[], object] = lambda: None) -> list[Figure]:
        """Count the graphs, then compile and time."""
        with fresh_compiler():
            seed_everything()
            counts = self.explain(quick)
        with fresh_compiler():
            figures = super().take(of, quick=quick, tick=tick)
        for quantity, values in counts.items():
            ratio = ratio_of(values[LORICA], values[PEFT])
            figures.append(Figure(of.name, self.name, quantity, "", values, ratio))
        return figures


@contextlib.contextmanager
def fresh_compiler() -> Any:
    """Start and end without compiled code."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def models(quick: bool, **fields: Any) -> tuple[dict[str, nn.Module], int]:
    """Return the sides and their width: 2 layers of width 256 (quick: 1 of 64)."""
    layers, width = (1, 64) if quick else (2, 256)
    base = llama(layers, width)
    return with_frozen(base, adapted(base, **fields)), width


def inputs(tokens: int, width: int) -> Tensor:
    """Return embeddings ``[1, tokens, width]``."""
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))


def graphs(quick: bool, *, tokens: int, **fields: Any) -> dict[str, dict[str, float]]:
    """Return how many graphs, and breaks between them, one call of each side has."""
    sides, width = models(quick, **fields)
    x = inputs(tokens, width)
    found = {}
    for side, model in sides.items():
        torch.compiler.reset()
        model.train(tokens > 1)
        found[side] = torch._dynamo.explain(model)(inputs_embeds=x, use_cache=False)
    return {
        GRAPHS: {side: float(told.graph_count) for side, told in found.items()},
        BREAKS: {side: float(told.graph_break_count) for side, told in found.items()},
    }


def build(quick: bool, *, tokens: int, maker: Callable[[nn.Module, Call, Tensor], Task], **fields: Any) -> Contest:
    """Return the contest of the compiled sides: of a step (dropout: of whatever each draws) or of a token."""
    sides, width = models(quick, **fields)
    x = inputs(64 if quick and tokens > 1 else tokens, width)
    compiled = {side: torch.compile(model.train(tokens > 1)) for side, model in sides.items()}
    return Contest(
        tasks={side: maker(model, call_llama, x) for side, model in compiled.items()},
        rounds=6 if quick else 60,
        models=sides,
        tolerance=None if fields.get("lora_dropout") else TOLERANCE[torch.float32],
    )


@measure("compiled", "Compiled by inductor: a training step, and a token")
def compiled() -> list[Case]:
    """Llama, 2 layers of width 256, rank 16 on every linear, `torch.compile` with its defaults; 256 tokens, or one
    token without autograd. *Graphs* and *graph breaks* are dynamo's, of one forward. On a CPU inductor fuses separate
    passes too, peft's among them, so the two are about level; counts of the dispatcher do not see into a graph."""
    cases: dict[str, dict[str, Any]] = {
        "training step, fp32": {"tokens": 256, "maker": step},
        "training step, fp32, dropout 0.05": {"tokens": 256, "maker": step, "lora_dropout": 0.05},
        "one token, fp32": {"tokens": 1, "maker": forward},
    }
    return [
        CompiledCase(
            name,
            partial(build, **fields),
            explain=partial(graphs, **{key: value for key, value in fields.items() if key != "maker"}),
        )
        for name, fields in cases.items()
    ]


__all__ = ["BREAKS", "FROZEN", "GRAPHS", "CompiledCase", "build", "graphs"]
