"""What each way of adapting layers that are cut sends, in counts: a change that sends more must say so here."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

import benchmarks.measures
from benchmarks.parallel import decoder, side, tensor_parallel
from benchmarks.parallel.sent import sent
from benchmarks.parallel.side import LORICA_A2A, MEGATRON, MEGATRON_A2A, PHASES
from benchmarks.suite import FROZEN, LORICA, MEASURES, PEFT, Figure
from lorica.bench import report

assert benchmarks.measures.__all__  # imported for what it enters into the registry

SIZES = decoder.Sizes(width=32, heads=4, inner=48, batch=2, tokens=8, layers=1)
ACTIVATIONS = 2 * 8 * 4  # bytes of one feature of all tokens, fp32
HIDDEN, WIDTH = ACTIVATIONS * decoder.RANK, ACTIVATIONS * SIZES.width
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = "all-reduce", "all-gather", "reduce-scatter", "all-to-all"


def beyond_the_base(sequence: bool) -> dict[str, dict[str, tuple[Counter[str], int]]]:
    sides = decoder.sides(SIZES, sequence=sequence)
    side.check_equal(sides)
    counts = {name: side.count(name, one) for name, one in sides.items()}
    frozen = counts.pop(FROZEN)
    return {
        name: {
            phase: (phases[phase].collectives - frozen[phase].collectives, phases[phase].bytes - frozen[phase].bytes)
            for phase in PHASES
        }
        for name, phases in counts.items()
    }


def ring(size: int, kind: str, ranks_: int = 2) -> int:
    """Bytes that a rank sends of a whole of this size."""
    return (2 if kind == ALL_REDUCE else 1) * size * (ranks_ - 1) // ranks_


def bytes_of(*sent_: tuple[str, int]) -> int:
    return sum(ring(size, kind) for kind, size in sent_)


def test_lorica_adds_nothing_and_megatron_what_its_description_says() -> None:
    """Two column-parallel layers and two row-parallel ones."""
    found = ranks.run(2, beyond_the_base, False)[0]
    for phase in ("forward", "backward"):
        assert found[LORICA][phase] == ({}, 0)
    assert found[LORICA]["gradient sums"][0] == {ALL_REDUCE: 1}
    forward, backward = found[MEGATRON]["forward"], found[MEGATRON]["backward"]
    assert forward[0] == {ALL_GATHER: 2 + 2, ALL_REDUCE: 2}
    assert forward[1] == 2 * bytes_of((ALL_GATHER, HIDDEN), (ALL_REDUCE, HIDDEN), (ALL_GATHER, WIDTH))
    assert backward[0] == {ALL_REDUCE: 2 * 2 + 2}
    assert backward[1] == 2 * bytes_of((ALL_REDUCE, HIDDEN), (ALL_REDUCE, WIDTH), (ALL_REDUCE, HIDDEN))
    assert found[MEGATRON]["gradient sums"] == ({}, 0)


def test_under_sequence_parallelism() -> None:
    found = ranks.run(2, beyond_the_base, True)[0]
    for phase in ("forward", "backward"):
        assert found[LORICA][phase] == ({}, 0)
    gathers, exchanges = (ALL_GATHER, HIDDEN), (ALL_TO_ALL, HIDDEN)
    assert found[LORICA_A2A]["forward"] == ({ALL_GATHER: 2, ALL_TO_ALL: 2}, 2 * bytes_of(gathers, exchanges))
    scatters = (REDUCE_SCATTER, HIDDEN)
    assert found[LORICA_A2A]["backward"] == ({REDUCE_SCATTER: 2, ALL_GATHER: 2}, 2 * bytes_of(scatters, gathers))
    for name in (LORICA, LORICA_A2A):
        assert found[name]["gradient sums"][0] == {ALL_REDUCE: 1}
    column = [(ALL_GATHER, WIDTH), (ALL_GATHER, HIDDEN)], [(ALL_REDUCE, HIDDEN), (REDUCE_SCATTER, WIDTH)]
    exchange = (ALL_TO_ALL, WIDTH // 2)  # of this rank's features
    rows = {
        MEGATRON: ([(ALL_REDUCE, HIDDEN), (ALL_GATHER, WIDTH)], [(ALL_GATHER, WIDTH), (ALL_REDUCE, HIDDEN)]),
        MEGATRON_A2A: ([(ALL_REDUCE, HIDDEN), exchange], [exchange, (ALL_REDUCE, HIDDEN)]),
    }
    for name, row in rows.items():
        for phase, ours, theirs in zip(("forward", "backward"), column, row, strict=True):
            every = 2 * [*ours, *theirs]
            assert found[name][phase] == (Counter(kind for kind, _ in every), bytes_of(*every)), f"{name}, {phase}"


def on_transformers() -> tuple[dict[str, dict[str, int]], list[str | None]]:
    sides = tensor_parallel.sides(SIZES)
    side.check_equal(sides)
    counts = {name: {phase: s.total for phase, s in side.count(name, one).items()} for name, one in sides.items()}
    return counts, [tensor_parallel.refusal(SIZES, [name]) for name in tensor_parallel.ROWS]


@pytest.mark.filterwarnings("ignore")
def test_peft_on_transformers_tensor_parallelism() -> None:
    """On columns it sums dh once per layer and pass; with rows it crashes. lorica: once per step."""
    counts, refusals = ranks.run(2, on_transformers)[0]
    for phase in ("forward", "backward"):
        assert counts[LORICA][phase] == counts[FROZEN][phase]
    assert counts[LORICA]["gradient sums"] == 1
    assert counts[PEFT]["backward"] - counts[FROZEN]["backward"] == len(tensor_parallel.COLUMNS)
    assert all(refusal is not None and "is invalid for input of size" in refusal for refusal in refusals)


def known() -> list[tuple[dict[str, int], int]]:
    x, found = torch.ones(6, dtype=torch.float64), []
    calls = [
        lambda: dist.all_reduce(x),
        lambda: dist.all_gather([torch.empty_like(x) for _ in range(3)], x),
        lambda: dist.reduce_scatter(torch.empty(2, dtype=x.dtype), list(x.chunk(3))),
        lambda: dist.all_to_all_single(torch.empty_like(x), x),
        lambda: x.sum(),
    ]
    for call in calls:
        _, counted = sent(call)
        found.append((dict(counted.collectives), counted.bytes))
    return found


def test_known_collectives_have_known_bytes() -> None:
    x = 6 * 8
    assert ranks.run(3, known)[0] == [
        ({ALL_REDUCE: 1}, 2 * x * 2 // 3),
        ({ALL_GATHER: 1}, 3 * x * 2 // 3),
        ({REDUCE_SCATTER: 1}, x * 2 // 3),
        ({ALL_TO_ALL: 1}, x * 2 // 3),
        ({}, 0),
    ]


def test_a_measure_taken_alone_leaves_the_others_as_they_are(tmp_path: Any) -> None:
    first, second = list(MEASURES)[:2]
    values = {PEFT: 1.0, LORICA: 0.5}
    old = [Figure(name, "one", "time", "s", values, 0.5, (0.4, 0.6), None, 9) for name in (first, second)]
    report.write_json(tmp_path / "results.json", report.Results({"date": "then"}, old, MEASURES))
    read = report.read_json(tmp_path / "results.json", MEASURES)
    assert read is not None
    assert read.figures == old
    new = Figure(first, "two", "time", "s", values, 0.5, (0.4, 0.6), None, 9, remark="it `fails`")
    joined = read.joined(report.Results({"date": "now"}, [new], MEASURES))
    assert joined.figures == [new, old[1]]
    assert (joined.facts, joined.apart) == ({"date": "then"}, {first: {"date": "now"}})
    report.write_markdown(tmp_path / "RESULTS.md", joined, "results.png")
    page = (tmp_path / "RESULTS.md").read_text()
    assert "two: it `fails`" in page
    assert "Taken in a run of its own: date: now." in page
    report.write_json(tmp_path / "results.json", joined)
    assert json.loads((tmp_path / "results.json").read_text())["apart"] == joined.apart
