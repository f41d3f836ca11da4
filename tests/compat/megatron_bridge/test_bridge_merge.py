"""``LoRAMerge``: shards of weights and factors in, shards of the merged weight out, on real process groups."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from lorica.compat.megatron_bridge import LoRAMerge
from lorica.errors import LayoutError

OUT, IN, DIM, ALPHA, EXPERTS = 24, 16, 8, 12, 3


def logical(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """A base weight, B and A, in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((OUT, IN), (OUT, DIM), (DIM, IN))
    base, b, a = (torch.randn(*lead, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return base, b, a


def share(tensor: Tensor, dim: int, size: int, rank: int) -> Tensor:
    """A rank's share, not contiguous where the dimension is the last one."""
    return tensor.chunk(size, dim)[rank]


def on_one(base: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return base + ALPHA / DIM * torch.einsum("...or,...ri->...oi", b, a)


def merge(base: Tensor, b: Tensor, a: Tensor, size: int, group: object) -> Tensor:
    return LoRAMerge().merge(base, b, a, ALPHA, DIM, tp_size=size, tp_group=group)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def kinds(size: int, rank: int, group: object) -> None:
    """Every kind of layer, each with the factors that must be gathered in pieces, and whole."""
    for lead in ((), (EXPERTS,)):
        base, b, a = logical(*lead)
        wanted = on_one(base, b, a)
        # Column: rows of the weight and of B are cut, A over the rank.
        shards = [share(tensor, -2, size, rank) for tensor in (base, b, a)]
        before = [shard.clone() for shard in shards]
        for linear_in in (shards[2], a):
            close(merge(shards[0], shards[1], linear_in, size, group), share(wanted, -2, size, rank))
        # Row: columns of the weight and of A are cut, B over the outputs.
        columns = [share(tensor, -1, size, rank) for tensor in (base, a)]
        for linear_out in (shards[1], b):
            close(merge(columns[0], linear_out, columns[1], size, group), share(wanted, -1, size, rank))
        assert all(torch.equal(now, then) for now, then in zip(shards, before, strict=True))  # nothing was written to
    # Experts that share a pair.
    base, b, a = logical()
    stack = torch.stack([base, 2 * base, 3 * base])
    wanted = torch.stack([on_one(one, b, a) for one in stack])
    found = merge(share(stack, -2, size, rank), share(b, -2, size, rank), share(a, -2, size, rank), size, group)
    close(found, share(wanted, -2, size, rank))


def on_ranks() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    kinds(size, rank, dist.group.WORLD)
    if size == 4:  # a group that is not all ranks, and whose members are not neighbours
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        kinds(2, rank // 2, groups[rank % 2])
        with pytest.raises(LayoutError, match="tp_size=4, but the group has 2 ranks"):
            kinds(4, rank, groups[rank % 2])


@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_merged_as_on_one_process(size: int) -> None:
    ranks.run(size, on_ranks)


def test_on_one_process() -> None:
    base, b, a = logical()
    close(merge(base, b, a, 1, None), on_one(base, b, a))


def test_sums_are_taken_in_the_widest_dtype_and_kept_in_the_weights() -> None:
    base, b, a = (tensor.bfloat16() for tensor in logical())
    found = merge(base, b.float(), a.float(), 1, None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, on_one(base.float(), b.float(), a.float()).bfloat16())


@pytest.mark.parametrize(
    ("base", "b", "a"),
    [
        ((OUT, IN), (OUT, DIM), (DIM, IN + 1)),
        ((OUT, IN), (OUT, DIM - 1), (DIM, IN)),
        ((OUT, IN), (OUT // 2, DIM), (DIM, IN)),
        ((OUT, IN), (OUT, DIM), (DIM // 2, IN)),
        ((OUT, IN), (EXPERTS, OUT, DIM), (DIM, IN)),
    ],
)
def test_what_does_not_fit_is_refused(base: tuple[int, ...], b: tuple[int, ...], a: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="belong to no weight of"):
        merge(torch.zeros(base), torch.zeros(b), torch.zeros(a), 1, None)
