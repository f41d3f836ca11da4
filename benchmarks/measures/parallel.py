"""A training step on many ranks: what is sent, and how long it takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.parallel import decoder, tensor_parallel
from benchmarks.parallel.decoder import Sizes
from benchmarks.parallel.ranks import on_ranks
from benchmarks.parallel.side import (
    LORICA_A2A,
    MEGATRON,
    MEGATRON_A2A,
    PHASES,
    Side,
    check_equal,
    count,
    flops,
    seconds,
)
from benchmarks.suite import FROZEN, LORICA, PEFT, Case, Figure, Measure, measure, ratio_of
from lorica.bench import timing

TINY = Sizes(width=64, heads=8, inner=176, batch=2, tokens=32)
MEDIUM = Sizes(width=1024, heads=16, inner=2816, batch=2, tokens=128)
ROUNDS, QUICK_ROUNDS = 8, 6


@dataclass(frozen=True)
class RanksCase(Case):
    """A case whose sides run on ranks of their own.

    Attributes:
        ranks: how many.
        other: whom lorica is compared with.
    """

    ranks: int = 2
    other: str = MEGATRON

    def take(self, of: Measure, *, quick: bool, tick: Callable[[], object] = lambda: None) -> list[Figure]:
        """Start the ranks and make figures of what they found."""
        found = on_ranks(self.ranks, self.build, quick)
        tick()
        figures = [_timed(of, self, "time", found["seconds"], LORICA, self.other)]
        if LORICA_A2A in found["seconds"]:
            own = {side: found["seconds"][side] for side in (LORICA, LORICA_A2A)}
            figures.append(_timed(of, self, "time, lorica a2a / lorica", own, LORICA_A2A, LORICA))
        figures += [_counted(of, self, quantity, values) for quantity, values in found["counts"].items()]
        return figures + [
            Figure(of.name, self.name, "failure", "", {}, None, remark=remark) for remark in found["remarks"]
        ]


def _timed(of: Measure, case: Case, quantity: str, found: dict[str, list[float]], top: str, bottom: str) -> Figure:
    medians = {side: statistics.median(samples) for side, samples in found.items()}
    spread = timing.paired_quartiles(found[top], found[bottom])
    over = None
    if FROZEN in found:
        over = ratio_of(*(timing.excess(found[side], found[FROZEN]) for side in (top, bottom)))
    ratio = ratio_of(medians[top], medians[bottom])
    return Figure(of.name, case.name, quantity, "s", medians, ratio, spread, over, len(found[top]))


def _counted(of: Measure, case: RanksCase, quantity: str, values: dict[str, float]) -> Figure:
    ours, theirs, frozen = (values[side] for side in (LORICA, case.other, FROZEN))
    unit = "B" if "bytes" in quantity else ""
    excess = ratio_of(ours - frozen, theirs - frozen)
    return Figure(of.name, case.name, quantity, unit, values, ratio_of(ours, theirs), excess=excess)


# ---- on the ranks ---------------------------------------------------------------------------------------------------


def of_native(sizes: Sizes, sequence: bool, quick: bool) -> dict[str, Any]:
    """Compare the ways of adapting native layers."""
    return _compare(decoder.sides(TINY if quick else sizes, sequence=sequence), quick, with_flops=True)


def of_transformers(sizes: Sizes, quick: bool) -> dict[str, Any]:
    """Compare peft and lorica on what transformers cut."""
    sizes = TINY if quick else sizes
    found = _compare(tensor_parallel.sides(sizes), quick, with_flops=False)
    for name in tensor_parallel.ROWS:
        refused = tensor_parallel.refusal(sizes, [name])
        found["remarks"].append(
            f"with `{name}` (row-parallel) among its targets peft "
            + ("trains" if refused is None else f"fails in the first step: `{refused}`")
        )
    return found


def _compare(sides: dict[str, Side], quick: bool, *, with_flops: bool) -> dict[str, Any]:
    check_equal(sides)
    counts = {
        quantity: {name: float(value) for name, value in values.items()}
        for quantity, values in counts_of(sides).items()
    }
    if with_flops:
        counts["FLOPs of each rank"] = {name: float(flops(name, side)) for name, side in sides.items()}
    return {"counts": counts, "seconds": seconds(sides, QUICK_ROUNDS if quick else ROUNDS), "remarks": []}


def counts_of(sides: dict[str, Side]) -> dict[str, dict[str, int]]:
    """Return how many collectives a step has and how many bytes a rank sends: in all, and by phase."""
    found = {name: count(name, side) for name, side in sides.items()}
    result: dict[str, dict[str, int]] = {}
    for what, of in (("collectives", lambda sent: sent.total), ("bytes sent", lambda sent: sent.bytes)):
        result[what] = {name: sum(of(sent) for sent in phases.values()) for name, phases in found.items()}
        for phase in PHASES:
            result[f"{what}, {phase}"] = {name: of(phases[phase]) for name, phases in found.items()}
    return result


@measure(
    "parallel",
    "Training step on many ranks: forward, backward and the sums of gradients",
    sides=(FROZEN, PEFT, MEGATRON, MEGATRON_A2A, LORICA, LORICA_A2A),
    against="lorica / other",
)
def parallel() -> list[Case]:
    """2 Llama-like layers (tiny: width 64, 2 × 32 tokens; medium: width 1024, 2 × 128 tokens), fp32, rank 16, gloo,
    one thread for each rank. *tp*: tensor parallelism, *sp*: with sequence parallelism. `megatron` is the
    communication of Megatron Bridge's adapters, written anew from its description (`benchmarks/parallel/megatron.py`),
    on the same base layers with one adapter for each of qkv, proj, fc1, fc2; `a2a`: with `a2a_experimental`. The ratio
    is lorica / megatron, or lorica / peft where transformers cut the model (column-parallel layers only, see below the
    table). All sides give the same output and input gradient (1e-5). *Bytes sent* by each rank are those of ring
    algorithms. Gradient sums are lorica's one bucket for each axis and step, however many passes are accumulated; they
    do not grow with the tokens. Times are of processes that share a memory and few cores: they say little of a network;
    counts do not jitter."""
    cases: list[Case] = [
        RanksCase(f"{kind}, {size}", partial(of_native, sizes, kind.endswith("sp")), int(kind[2]))
        for kind in ("tp2", "tp2 sp", "tp4 sp")
        for size, sizes in (("tiny", TINY), ("medium", MEDIUM))
        if (kind, size) != ("tp4 sp", "medium")
    ]
    return cases + [
        RanksCase(f"transformers tp2, columns, {size}", partial(of_transformers, sizes), 2, PEFT)
        for size, sizes in (("tiny", TINY), ("medium", MEDIUM))
    ]
