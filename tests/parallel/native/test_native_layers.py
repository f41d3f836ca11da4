"""Layers cut by columns, rows, words, features and heads: outputs and every gradient are those of the whole layer."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from collective_counts import Collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lorica.engines.gather import gather
from lorica.engines.native import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    Native,
    ParallelEmbedding,
    RowParallelLinear,
)
from lorica.engines.native.collectives import shares
from lorica.engines.site import Axis
from lorica.errors import LayoutError
from lorica.layout import fused, grouped_heads


def close(a: Tensor, b: Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda message: f"{what}: {message}")


def tp() -> Axis:
    return Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), 0)


def own(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's tokens."""
    return torch.split(x.detach(), list(shares(x.shape[dim], axis.size)), dim)[axis.rank].clone()


def whole_gradient(layer: Native, name: str) -> Tensor:
    """The logical gradient of a trained parameter: copies of the same rows have partial ones, and so has a bias that
    was added to this rank's tokens only."""
    parameter, roles, (cut,) = layer.get_parameter(name), layer.roles[name], layer.layout.cuts
    partial = cut.copies > 1 if cut.dim in roles else layer.sequence_parallel_enabled
    if cut.dim in roles and not partial:
        return gather(parameter.grad, layer.layout, roles, layer.logical_shape(name), layer.axes)
    total = torch.zeros(layer.logical_shape(name))
    layer.layout.put(total, parameter.grad, roles, layer.at)
    if partial:
        dist.all_reduce(total)
    return total


def check(layer: Any, whole: nn.Module, x: Tensor, *, x_of: Any = None, y_of: Any = None) -> None:
    """Compare one forward and backward of a cut layer with those of the whole one.

    ``x_of`` and ``y_of`` give what this rank has of the input and of the output.
    """
    x_of, y_of = x_of or (lambda x: x.detach().clone()), y_of or (lambda y: y)
    lookup = isinstance(whole, nn.Embedding)
    x_whole = x.clone() if lookup else x.clone().requires_grad_()
    weights = torch.randn_like(y := whole(x_whole))
    (y * weights).sum().backward()
    x_own = x_of(x) if lookup else x_of(x).requires_grad_()
    y_own = layer(x_own)
    close(y_own, y_of(y.detach()), "output")
    (y_own * y_of(weights)).sum().backward()
    if not lookup:
        close(x_own.grad, x_of(x_whole.grad), "input gradient")
    for name, parameter in whole.named_parameters():
        close(layer.logical(name), parameter.detach(), f"logical {name}")
        close(whole_gradient(layer, name), parameter.grad, f"gradient of {name}")


def columns(sequence: int, size: int, bias: bool) -> None:
    axis = tp()
    whole, x = nn.Linear(6, size, bias=bias), torch.randn(2, sequence, 6)
    order = fused("tp", "out", (3, 5), axis.size) if size == 8 else None
    cut = ColumnParallelLinear.from_linear(whole, axis, cut=order).layout.cuts[0]
    bounds = [place for held in cut.held for a, b in held for place in range(a, b)]
    place = sum(cut.length(rank) for rank in range(axis.rank))
    rows = bounds[place : place + cut.length(axis.rank)]
    for parallel in (False, True):
        x_of = (lambda x: own(x, axis, 1)) if parallel else None
        options = {"cut": order, "sequence_parallel_enabled": parallel}
        check(ColumnParallelLinear.from_linear(whole, axis, **options), whole, x, x_of=x_of)
        whole.zero_grad()
        layer = ColumnParallelLinear.from_linear(whole, axis, gather_output=False, **options)
        check(layer, whole, x, x_of=x_of, y_of=lambda y: y[..., rows])
        whole.zero_grad()


def rows(sequence: int, size: int, bias: bool) -> None:
    axis = tp()
    whole, x = nn.Linear(size, 6, bias=bias), torch.randn(2, sequence, size)
    order = fused("tp", "in", (3, 5), axis.size) if size == 8 else None
    for parallel in (False, True):
        y_of = (lambda y: own(y, axis, 1)) if parallel else None
        options = {"cut": order, "sequence_parallel_enabled": parallel}
        layer = RowParallelLinear.from_linear(whole, axis, **options)
        check(layer, whole, x, y_of=y_of)
        whole.zero_grad()
        layer = RowParallelLinear.from_linear(whole, axis, input_is_parallel=True, **options)
        mine = [p for a, b in layer.layout.cuts[0].held[axis.rank] for p in range(a, b)]
        check(layer, whole, x, x_of=lambda x, mine=mine: x.detach()[..., mine].clone(), y_of=y_of)
        whole.zero_grad()


def embeddings(words: int) -> None:
    axis = tp()
    whole, ids = nn.Embedding(words, 8, padding_idx=words - 2), torch.randint(0, words, (2, 5))
    for options in ({}, {"shard_across_embedding": True}, {"sequence_parallel_enabled": True}):
        parallel = "sequence_parallel_enabled" in options
        layer = ParallelEmbedding.from_embedding(whole, axis, **options)
        check(layer, whole, ids, y_of=(lambda y: own(y, axis, 1)) if parallel else None)
        whole.zero_grad()


class Fused(nn.Module):
    """The oracle of q, k and v: each is returned with the heads that this rank has."""

    def __init__(self, linears: list[nn.Linear], heads: Any, rank: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.heads, self.rank = heads, rank

    def forward(self, x: Tensor) -> list[Tensor]:
        own = [self.heads.query, self.heads.kv, self.heads.kv]
        return [
            linear(x).unflatten(-1, (-1, 2))[..., list(heads[self.rank]), :].flatten(-2)
            for linear, heads in zip(self.linears, own, strict=True)
        ]


def grouped(order: str, fuse: bool, parallel: bool, bias: bool) -> None:
    axis = tp()
    linears = [nn.Linear(6, 16, bias=bias), nn.Linear(6, 8, bias=bias), nn.Linear(6, 8, bias=bias)]
    layer = GQAQKVColumnParallelLinear.from_linears(
        *linears, axis, head_dim=2, fuse_qkv=fuse, order=order, sequence_parallel_enabled=parallel
    )
    assert layer.heads == grouped_heads(axis.size, 8, 4, order=order)
    x = torch.randn(2, 5, 6).requires_grad_()
    whole = Fused(linears, layer.heads, axis.rank)
    expected = whole(x)
    weights = [torch.randn_like(part) * (axis.rank + 1) for part in expected]
    sum((part * w).sum() for part, w in zip(expected, weights, strict=True)).backward()
    for tensor in (x, *whole.parameters()):  # the sum over the ranks of what each did with its heads
        dist.all_reduce(tensor.grad)
    x_own = (own(x, axis, 1) if parallel else x.detach().clone()).requires_grad_()
    result = layer(x_own)
    for part, mine in zip(expected, result, strict=True):
        close(mine, part.detach())
    sum((part * w).sum() for part, w in zip(result, weights, strict=True)).backward()
    close(x_own.grad, own(x.grad, axis, 1) if parallel else x.grad, "input gradient")
    names = ["weight", "bias"] if bias else ["weight"]
    for name in names:
        gradients = [linear.get_parameter(name).grad for linear in linears]
        if fuse:
            close(whole_gradient(layer.qkv_proj, name), torch.cat(gradients), name)
        else:
            for part, gradient in zip((layer.q_proj, layer.k_proj, layer.v_proj), gradients, strict=True):
                close(whole_gradient(part, name), gradient, name)


def all_layers() -> None:
    for sequence in (5, 1):
        for size in (8, 5):
            columns(sequence, size, bias=size == 5)
            rows(sequence, size, bias=size == 5)
    for words in (16, 11):
        embeddings(words)
    for order in ("strided", "neighbours"):
        for fuse in (False, True):
            grouped(order, fuse, parallel=fuse, bias=not fuse)
            grouped(order, fuse, parallel=not fuse, bias=fuse)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_equal_the_whole_ones(size: int) -> None:
    ranks.run(size, all_layers)


def eight() -> None:
    grouped("strided", fuse=True, parallel=True, bias=True)
    grouped("neighbours", fuse=False, parallel=False, bias=False)
    columns(5, 5, bias=True)  # fewer rows, and fewer tokens, than ranks
    rows(5, 5, bias=True)


def test_more_ranks_than_heads_rows_and_tokens() -> None:
    ranks.run(8, eight)


def same_seed() -> list[Tensor]:
    axis = tp()
    layers = [
        ColumnParallelLinear(4, 6, axis=axis),
        RowParallelLinear(6, 4, axis=axis),
        ParallelEmbedding(7, 4, 1, axis=axis),
    ]
    return [layer.logical(name) for layer in layers for name, _ in layer.named_parameters()]


def test_a_seed_draws_the_same_layers_on_every_layout() -> None:
    one, three = ranks.run(1, same_seed)[0], ranks.run(3, same_seed)[0]
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def counts() -> dict[str, list[dict[str, int]]]:
    axis, linear, table = tp(), nn.Linear(8, 8, bias=False), nn.Embedding(8, 8)
    x = torch.randn(1, 4, 8, requires_grad=True)
    x_sequence, mine = own(x, axis, 1).requires_grad_(), x[..., : 8 // axis.size]
    sequence = {"sequence_parallel_enabled": True}
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "column": (ColumnParallelLinear.from_linear(linear, axis, gather_output=False), x),
        "column, gathered": (ColumnParallelLinear.from_linear(linear, axis), x),
        "row": (RowParallelLinear.from_linear(linear, axis, input_is_parallel=True), mine),
        "row, sequence": (RowParallelLinear.from_linear(linear, axis, input_is_parallel=True, **sequence), mine),
        "column, sequence": (
            ColumnParallelLinear.from_linear(linear, axis, gather_output=False, **sequence),
            x_sequence,
        ),
        "words": (ParallelEmbedding.from_embedding(table, axis), torch.arange(4)[None]),
    }
    found = {}
    for name, (layer, given) in cases.items():
        layer.requires_grad_(name == "words")
        with Collectives() as forward:
            y = layer(given)
        with Collectives() as backward:
            y.sum().backward()
        found[name] = [dict(forward.counts), dict(backward.counts)]
    return found


def test_collectives_of_each_layer() -> None:
    one_gather, one_reduce, one_scatter = {"all_gather": 1}, {"all_reduce": 1}, {"reduce_scatter": 1}
    assert ranks.run(2, counts)[0] == {
        "column": [{}, one_reduce],
        "column, gathered": [one_gather, one_reduce],
        "row": [one_reduce, {}],
        "row, sequence": [one_scatter, one_gather],
        "column, sequence": [{"all_gather": 2}, one_scatter],  # the lengths, the tokens
        "words": [one_reduce, {}],
    }
    assert all(modes == [{}, {}] for modes in ranks.run(1, counts)[0].values())


def alone() -> Axis:
    return Axis("tp", 2, 0, None)


class Wrapped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColumnParallelLinear.from_linear(Wrapped(4, 4), alone()), "Wrapped"),
        (lambda: ColumnParallelLinear.from_linear(ColumnParallelLinear(4, 4, axis=alone()), alone()), "cannot be cut"),
        (lambda: ParallelEmbedding.from_embedding(nn.Embedding(4, 2, max_norm=1.0), alone()), "max_norm"),
        (lambda: ParallelEmbedding(1, 4, axis=alone()), "do not reach"),
        (
            lambda: ParallelEmbedding(4, 4, axis=alone(), shard_across_embedding=True, sequence_parallel_enabled=True),
            "reduce",
        ),
        (
            lambda: ColumnParallelLinear(4, 4, axis=alone(), cut=fused("tp", "out", (2, 2), 4)),
            "4 ranks on an axis of 2",
        ),
        (lambda: ColumnParallelLinear(4, 6, axis=alone(), cut=fused("tp", "out", (2, 2), 2)), "4 positions"),
        (lambda: GQAQKVColumnParallelLinear(4, (8, 3), axis=alone(), head_dim=2), "heads of 2"),
        (lambda: GQAQKVColumnParallelLinear(4, (6, 6), axis=alone(), head_dim=2), "do not divide"),
        (
            lambda: GQAQKVColumnParallelLinear(4, (8, 2), axis=alone(), head_dim=2, gather_output=True, fuse_qkv=False),
            "count twice",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        make()


def replaced() -> None:
    axis = tp()
    for layer in (
        ColumnParallelLinear(4, 4, axis=axis, gather_output=False),
        RowParallelLinear(4, 4, bias=False, axis=axis),
        ParallelEmbedding(4, 4, axis=axis),
    ):
        seen = []
        inner = layer.product
        layer.product = lambda x, inner=inner, seen=seen: seen.append(x.shape) or inner(x) * 2
        x = torch.arange(4)[None] if isinstance(layer, nn.Embedding) else torch.randn(3, 4)
        twice = layer(x)
        del layer.product
        close(twice, layer(x) * 2)
        assert len(seen) == 1


def test_the_product_can_be_replaced() -> None:
    ranks.run(2, replaced)
