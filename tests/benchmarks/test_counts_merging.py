"""What merging and an optimiser's step need, in counts that do not jitter: kernels, bytes moved, peak bytes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measures import merging, optimiser
from benchmarks.suite import LORICA, PEFT, count_sides, quiet
from lorica.storage import deltas

LINEARS = 7


def counts(dtype: torch.dtype, width: int = 1024) -> dict[str, dict[str, int]]:
    with quiet():
        return count_sides(merging.build(True, layers=1, width=width, dtype=dtype))


@pytest.mark.parametrize("width", [512, 1024])
def test_a_weight_in_float32_is_one_kernel_there_and_one_back_and_needs_no_memory(width):
    found = counts(torch.float32, width)
    assert found[PEFT]["kernels"] == 3 * 2 * LINEARS, "peft is pinned"
    assert found[LORICA]["kernels"] == 2 * LINEARS
    assert found[LORICA]["peak bytes"] == 0
    assert found[LORICA]["bytes moved"] <= 0.36 * found[PEFT]["bytes moved"]
    assert found[LORICA]["FLOPs"] == found[PEFT]["FLOPs"]


@pytest.mark.parametrize("elements", [2**12, 2**14, 2**22])
def test_a_weight_in_16_bits_needs_one_chunk_for_all_layers(monkeypatch, elements):
    monkeypatch.setattr(deltas, "CHUNK_ELEMENTS", elements)
    found = counts(torch.bfloat16)
    width, inner = 256, 704
    sizes = [(width, width)] * 2 + [(width // 2, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    limit = min(elements, deltas.CACHED_ELEMENTS * torch.get_num_threads())
    chunks = [-(-rows // max(1, limit // cols)) for rows, cols in sizes]
    # There and back: a chunk is widened, added to, and rounded once.
    assert found[LORICA]["kernels"] == 2 * 3 * sum(chunks)
    assert found[LORICA]["peak bytes"] <= 4 * min(limit, max(rows * cols for rows, cols in sizes))
    assert found[LORICA]["bytes moved"] <= 0.93 * found[PEFT]["bytes moved"] + 2 * 4 * 16 * sum(
        count * cols for count, (_, cols) in zip(chunks, sizes, strict=True)
    )


def test_looking_for_nan_copies_a_chunk_and_not_the_weight(monkeypatch):
    monkeypatch.setattr(deltas, "CHUNK_ELEMENTS", 2**14)
    with quiet():
        contest = merging.build(True, layers=1, width=1024, dtype=torch.float32, safe_merge=True)
        found = count_sides(contest)
    numbers = 64  # the two ends of a chunk
    assert found[LORICA]["peak bytes"] <= 4 * 2**14 + numbers
    assert found[LORICA]["bytes moved"] <= 0.75 * found[PEFT]["bytes moved"]


def test_a_step_over_896_factors_is_two_kernels_and_reads_each_number_once():
    with quiet():
        contest = optimiser.build(True, width=128)
        for task in contest.tasks.values():
            task.once()
        found = count_sides(contest)
    numbers = sum(parameter.numel() for parameter in optimiser.factors(128 // 4))
    assert found[PEFT]["kernels"] > 8 * 896, "torch's loop"
    assert found[LORICA]["kernels"] == 2
    # The parameter and its two moments are read and written, the gradient is read; and the kernel may write it.
    assert found[LORICA]["bytes moved"] <= 4 * (8 * numbers + 4 * 896)
    assert found[LORICA]["peak bytes"] == 0
