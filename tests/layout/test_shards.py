"""The local merges of all ranks together are the merge of the whole weight."""

from __future__ import annotations

from typing import Any

import drawn
import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.engines.site import Axis
from lorica.errors import LayoutError
from lorica.layers.shards import merge_shard_
from lorica.layout import Layout, Roles, even, grouped_heads

RANK, SCALE = 2, 0.5
law = settings(deadline=None, derandomize=True, max_examples=60)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def whole(roles: Roles, layout: Layout, shared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, its factors, and what it becomes."""
    sizes = {str(role): size for role, size in layout.sizes.items()}
    expert = [sizes["expert"]] if roles[0] == "expert" else []
    own = [] if shared else expert
    weight = random(*(sizes[role] for role in roles))
    a, b = random(*own, RANK, sizes["in"]), random(*own, sizes["out"], RANK)
    delta = SCALE * (b @ a)
    return weight, a, b, weight + (delta if roles[-1] == "in" else delta.mT)


@law
@given(drawn.layouts(), st.sampled_from([("out", "in"), ("in", "out"), ("expert", "out", "in")]), st.booleans())
def test_local_merges_are_slices_of_the_whole_one(layout: Layout, roles: Roles, shared: bool):
    assume("expert" in roles or layout.cut_of("expert") is None)
    layout = Layout(layout.sizes, layout.cuts)
    weight, a, b, merged = whole(roles, layout, shared)
    expert = ("expert",) if a.dim() == 3 else ()
    for at in drawn.ranks(layout):
        local = layout.take(weight, roles, at)
        mine = [layout.take(a, (*expert, "rank", "in"), at), layout.take(b, (*expert, "out", "rank"), at)]
        found = merge_shard_(local.clone(), *mine, layout, at, scaling=SCALE, roles=roles)
        torch.testing.assert_close(found, layout.take(merged, roles, at), rtol=1e-12, atol=1e-12)
        options: Any = {"a_given": "logical", "b_given": "logical"}
        again = merge_shard_(local, a, b, layout, at, scaling=SCALE, roles=roles, **options)
        assert again is local
        assert torch.equal(again, found)


def test_fused_heads_with_copies_keep_their_own_a():
    parts = (("q_proj", 16), ("k_proj", 4), ("v_proj", 4))
    layout = Layout({"out": 24, "in": 5}, (grouped_heads(4, 8, 2).qkv_cut("tp", 2),), parts)
    weight, a, b = random(24, 5), random(3 * RANK, 5), random(24, RANK)
    merged = weight.clone()
    for index, (_, first, last) in enumerate(layout.part_bounds()):
        merged[first:last] += SCALE * b[first:last] @ a[index * RANK : (index + 1) * RANK]
    for rank in range(4):
        at = {"tp": rank}
        local = layout.take(weight, ("out", "in"), at)
        merge_shard_(local, a, layout.take(b, ("out", "rank"), at), layout, at, scaling=SCALE)
        torch.testing.assert_close(local, layout.take(merged, ("out", "in"), at), rtol=1e-12, atol=1e-12)


def test_a_shape_that_the_layout_does_not_have_is_refused():
    layout, at = Layout({"out": 8, "in": 4}, (even("tp", "out", 8, 2),)), {"tp": 1}
    weight, a, b = random(4, 4), random(RANK, 4), random(4, RANK)
    for wrong in ([random(8, 4), a, b], [weight, random(RANK, 3), b], [weight, a, random(8, RANK)], [weight, b, a]):
        with pytest.raises(LayoutError, match="shape"):
            merge_shard_(*wrong, layout, at, scaling=1.0)
    with pytest.raises(LayoutError, match="parts do not fit"):
        merge_shard_(weight, random(3, 4), b, layout, at, scaling=1.0)


def _merge_as_megatron_lies() -> list[Tensor]:
    """A of a column layer cut along its rank, B of a row layer along its rows, on two ranks."""
    rank = dist.get_rank()
    axes = {"tp": Axis("tp", 2, rank, dist.group.WORLD)}
    at, found = {"tp": rank}, []
    for dim in ("out", "in"):
        torch.manual_seed(0)
        layout = Layout({"out": 6, "in": 5}, (even("tp", dim, {"out": 6, "in": 5}[dim], 2),))  # type: ignore[arg-type]
        weight, a, b, merged = whole(("out", "in"), layout, shared=True)
        own = Layout({"out": RANK if dim == "out" else 6}, (even("tp", "out", RANK if dim == "out" else 6, 2),))
        local = layout.take(weight, ("out", "in"), at)
        if dim == "out":
            factors = (own.take(a, ("out", "in"), at), layout.take(b, ("out", "rank"), at))
            options: Any = {"a_given": (own, ("out", "in"))}
        else:
            factors = (layout.take(a, ("rank", "in"), at), own.take(b, ("out", "rank"), at))
            options = {"b_given": (own, ("out", "rank"))}
        merge_shard_(local, *factors, layout, at, scaling=SCALE, axes=axes, **options)
        found.append((local - layout.take(merged, ("out", "in"), at)).abs().max())
    return found


def test_factors_that_lie_otherwise_are_gathered():
    for errors in ranks.run(2, _merge_as_megatron_lies):
        assert max(errors) < 1e-12
