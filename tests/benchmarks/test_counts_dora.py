"""What DoRA's training step needs beside plain LoRA's and beside peft's, in counts that do not jitter."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measures import dora
from benchmarks.suite import FROZEN, LORICA, PEFT, count_sides, quiet
from lorica.bench import counting

Counts = dict[str, dict[str, int]]

KINDS = {
    "fp32": {},
    "dropout": {"dropout": 0.05},
    "bf16": {"dtype": torch.bfloat16},
    "bf16-dropout": {"dtype": torch.bfloat16, "dropout": 0.05},
}
WIDTH, TOKENS, R = 256, 128, 16

# lorica's kernels beyond those of its plain LoRA: the norms, gain and its product, three in backward; and bytes moved
# of a small Llama, against peft's.
KERNELS = {"fp32": 16, "dropout": 16, "bf16": 17, "bf16-dropout": 17}
MOVED = {"fp32": 0.59, "dropout": 0.55, "bf16": 0.43, "bf16-dropout": 0.39}


@pytest.fixture(scope="module", params=KINDS)
def linear(request) -> tuple[str, Counts]:
    with quiet():
        return request.param, count_sides(dora.build(True, whole_model=False, **KINDS[request.param]))


def test_there_is_no_second_base_product(linear):
    """The norms multiply W with Aᵀ, A with Aᵀ and B with that; all else is plain LoRA's, with dropout too."""
    kind, counts = linear
    norms = 2 * R * WIDTH * WIDTH + 2 * (2 * R * R * WIDTH)
    assert counts[LORICA]["FLOPs"] == counts[dora.PLAIN]["FLOPs"] + norms
    assert counts[dora.PLAIN]["FLOPs"] - counts[FROZEN]["FLOPs"] == 6 * TOKENS * R * 2 * WIDTH
    assert counts[LORICA]["FLOPs"] < counts[PEFT]["FLOPs"]
    if "dropout" in kind:
        base = 2 * TOKENS * WIDTH * WIDTH
        assert counts[PEFT]["FLOPs"] - counts[LORICA]["FLOPs"] > base, "peft is pinned"


def test_kernels_beyond_plain_lora(linear):
    kind, counts = linear
    assert counts[LORICA]["kernels"] - counts[dora.PLAIN]["kernels"] <= KERNELS[kind]
    if "dropout" not in kind:
        assert counts[LORICA]["kernels"] <= counts[PEFT]["kernels"]


def test_what_is_kept_for_backward_beyond_plain_lora_is_one_output(linear):
    kind, counts = linear
    output = TOKENS * WIDTH * (2 if "bf16" in kind else 4)
    small = 4 * WIDTH * 4  # of the size of the outputs: gain and norms
    assert counts[LORICA]["saved bytes"] <= counts[dora.PLAIN]["saved bytes"] + output + small
    assert counts[LORICA]["saved bytes"] <= 0.52 * counts[PEFT]["saved bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_moves_less_than_with_peft(kind):
    with quiet():
        counts = count_sides(dora.build(True, **KINDS[kind]))
    assert counts[LORICA]["bytes moved"] <= MOVED[kind] * counts[PEFT]["bytes moved"]
    assert counts[LORICA]["saved bytes"] <= 0.65 * counts[PEFT]["saved bytes"]
    assert counts[LORICA]["peak bytes"] <= 0.75 * counts[PEFT]["peak bytes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_of_the_weight_s_size(monkeypatch, dtype):
    """With few tokens nothing else is large: what is widened of a 16-bit weight is a chunk of its rows."""
    rows, width = 32, 512
    monkeypatch.setattr(dora_norms(), "CHUNK_ELEMENTS", rows * width)
    with quiet():
        base = dora.chain(1, width, dtype)
        contest = dora.contest_of(
            base, dora.call_chain, torch.randn(1, 4, width, dtype=dtype), rounds=1, tolerance=None
        )
        counts = count_sides(contest)
    factors = 4 * R * width * 4  # gradients, and what is as large as a factor
    widened = 0 if dtype == torch.float32 else 2 * rows * width * 4
    assert counts[LORICA]["peak bytes"] <= counts[dora.PLAIN]["peak bytes"] + factors + widened
    assert counts[LORICA]["peak bytes"] < width * width * dtype.itemsize
    assert counts[PEFT]["peak bytes"] > 2 * width * width * 4, "peft is pinned"


def test_the_weight_is_read_once_for_the_norms():
    """``‖W‖²`` is kept while the weight is what it was."""
    width = 512
    with quiet():
        base = dora.chain(1, width)
        contest = dora.contest_of(base, dora.call_chain, torch.randn(1, 4, width), rounds=1, tolerance=None)
    model, task = contest.models[LORICA], contest.tasks[LORICA]
    task.once()
    moved = [counting.count(task.run, model, reset=task.reset)["bytes moved"]]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "base_layer" in n).mul_(1.0)  # a write
    moved.append(counting.count(task.run, model, reset=task.reset)["bytes moved"])
    weight = width * width * 4
    assert weight <= moved[1] - moved[0] <= 1.05 * weight + 4096


def dora_norms():
    from lorica.variants import dora as variant

    return variant
