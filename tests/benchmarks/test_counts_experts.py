"""What stacked experts and batches of several adapters cost beside peft, in counts that do not jitter.

Each bound is what was measured, rounded up a little.
"""

from __future__ import annotations

import pytest

from benchmarks.measures import experts, rows
from benchmarks.suite import FROZEN, LORICA, PEFT, count_sides, quiet

Counts = dict[str, dict[str, int]]

#: Experts and their implementation → bytes moved and peak over the frozen base, against peft's; saved bytes in all.
TRAINING = {
    (8, "eager"): (0.03, 0.02, 0.18),
    (8, "grouped_mm"): (0.08, 0.03, 0.17),
    (64, "eager"): (0.01, 0.03, 0.18),
    (64, "grouped_mm"): (0.09, 0.06, 0.16),
}


def excess(counts: Counts, quantity: str) -> float:
    frozen, peft, ours = (counts[side][quantity] for side in (FROZEN, PEFT, LORICA))
    return (ours - frozen) / (peft - frozen)


def block(count: int, implementation: str, *, train: bool) -> Counts:
    tokens = 128 if train else 1
    with quiet():
        contest = experts.build(
            True, experts=count, implementation=implementation, tokens=tokens, train=train, width=256
        )
        return count_sides(contest)


@pytest.mark.parametrize(("count", "implementation"), TRAINING)
def test_training_experts_costs_what_their_tokens_cost(count, implementation):
    counts = block(count, implementation, train=True)
    moved, peak, saved = TRAINING[count, implementation]
    assert excess(counts, "bytes moved") <= moved
    assert excess(counts, "peak bytes") <= peak
    assert counts[LORICA]["saved bytes"] <= saved * counts[PEFT]["saved bytes"]
    top_k, inner = experts.SHAPES[count]
    width, r, pairs = 256, 8, 128 * top_k
    # Forward, and each product's two in backward: of the routed tokens with both factors of both stacks.
    products = 6 * pairs * r * (width + 3 * int(inner * width) + width)
    assert counts[LORICA]["FLOPs"] - counts[FROZEN]["FLOPs"] == products
    # Kept besides: the routed tokens' inputs of both stacks, and what A makes of them.
    kept = 4 * pairs * (width + int(inner * width) + 2 * r)
    assert counts[LORICA]["saved bytes"] - counts[FROZEN]["saved bytes"] <= kept


@pytest.mark.parametrize("implementation", experts.IMPLEMENTATIONS)
@pytest.mark.parametrize("count", experts.SHAPES)
def test_decoding_with_experts_reads_the_factors_of_a_tokens_experts(count, implementation):
    counts = block(count, implementation, train=False)
    assert excess(counts, "bytes moved") <= 0.02
    assert excess(counts, "peak bytes") <= 0.01
    top_k, _ = experts.SHAPES[count]
    each = 2 * top_k if implementation == "eager" else 7  # an index, its two factors in order and their products
    assert counts[LORICA]["kernels"] - counts[FROZEN]["kernels"] <= 2 * each


def mixed(count: int, adapters: int, tokens: int, *, kept: bool = False) -> Counts:
    with quiet():
        contest = rows.build(True, rows=count, adapters=adapters, tokens=tokens, kept=kept)
        contest.tasks[LORICA].once()  # a generation that goes on
        counts = count_sides(contest)
        contest.close()
        return counts


def test_rows_of_64_adapters_take_the_kernels_of_a_few():
    counts = mixed(64, 64, 1)
    # Copies of A's and B's and two products, for each piece of 512 kB: two in attention, four in the rest.
    assert counts[LORICA]["kernels"] - counts[FROZEN]["kernels"] <= 2 * (4 * 8 + 3 * 16)
    assert counts[PEFT]["kernels"] - counts[FROZEN]["kernels"] > 6000, "peft is pinned"
    assert excess(counts, "bytes moved") <= 0.18
    assert counts[LORICA]["peak bytes"] <= counts[FROZEN]["peak bytes"] + 2**19
    assert excess(counts, "FLOPs") == 1.0


def test_rows_of_few_adapters_are_put_in_order_once():
    counts = mixed(64, 4, 1)
    assert counts[LORICA]["kernels"] - counts[FROZEN]["kernels"] <= 6 * 2 * 7
    assert excess(counts, "bytes moved") <= 0.37


def test_steps_of_one_generation_share_the_copies():
    counts = mixed(64, 64, 1, kept=True)
    assert counts[LORICA]["kernels"] - counts[FROZEN]["kernels"] <= 2 * 2 * 7
    assert excess(counts, "bytes moved") <= 0.07
    assert counts[LORICA]["peak bytes"] <= counts[FROZEN]["peak bytes"]


@pytest.mark.parametrize(("count", "moved", "in_all"), [(16, 0.051, 0.146), (64, 0.015, 0.044)])
def test_prompts_of_a_mixed_batch_are_not_copied(count, moved, in_all):
    counts = mixed(count, count, 64)
    assert excess(counts, "bytes moved") <= moved
    assert counts[LORICA]["bytes moved"] <= in_all * counts[PEFT]["bytes moved"]
    assert counts[LORICA]["peak bytes"] <= counts[FROZEN]["peak bytes"]
    assert excess(counts, "FLOPs") == 1.0
