"""The table of forward and gradients, with every rank simulated in one process.

Each rank computes with its slices alone; what the base layer's collectives would do is done here by hand. The
gradients that ``summed`` names are then added up, and must be those of the same adapter in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from drawn import dealt, law, layouts, orders, positions, ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.layout import Cut, HeadOrder, Layout, Roles, even, grouped_heads

A, B, W = ("rank", "in"), ("out", "rank"), ("out", "in")
EXPERT_A, EXPERT_B = ("expert", "rank", "in"), ("expert", "out", "rank")
SCALE, RANK, TOKENS = 0.7, 3, 5


@dataclass
class Held:
    """What one rank has: coordinates, and leaves that collect gradients."""

    at: dict[str, int]
    a: Tensor
    b: Tensor


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def deal(layout: Layout, a: Tensor, b: Tensor, roles_a: Roles = A, roles_b: Roles = B) -> list[Held]:
    """The slices of every rank."""
    return [Held(at, leaf(layout.take(a, roles_a, at)), leaf(layout.take(b, roles_b, at))) for at in ranks(layout)]


def reduced(layout: Layout, roles: Roles, held: list[tuple[dict[str, int], Tensor]], whole: Tensor) -> None:
    """Check that summing over the axes that ``summed`` names, and no others, gives each rank its slice of ``whole``.

    A sum is over the same logical elements: ranks put what they hold into their places, as the bucket of an axis does.
    """
    axes = set(layout.summed(roles))
    for at, _ in held:
        total = torch.zeros_like(whole)
        for other, gradient in held:
            if all(other[axis] == at[axis] for axis in at if axis not in axes):
                for box in layout.boxes(roles, whole.shape, other):
                    total[box.logical] += gradient[box.local]
        assert torch.allclose(layout.take(total, roles, at), layout.take(whole, roles, at), atol=1e-12)


def check(layout: Layout, held: list[Held], a: Tensor, b: Tensor, roles_a: Roles = A, roles_b: Roles = B) -> None:
    assert a.grad is not None
    assert b.grad is not None
    reduced(layout, roles_a, [(rank.at, _gradient(rank.a)) for rank in held], a.grad)
    reduced(layout, roles_b, [(rank.at, _gradient(rank.b)) for rank in held], b.grad)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def one_piece(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ weight.T + SCALE * (x @ a.T) @ b.T


def of_linear(layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Held]]:
    """Input, weight, logical factors, the gradient of the output, and what the ranks hold."""
    out, columns = layout.sizes["out"], layout.sizes["in"]
    x, weight = leaf(normal(TOKENS, columns)), normal(out, columns)
    a, b = leaf(normal(RANK, columns)), leaf(normal(out, RANK))
    return x, weight, a, b, normal(TOKENS, out), deal(layout, a.detach(), b.detach())


@law
@given(layouts())
def test_linear_layers_under_any_cuts(layout: Layout) -> None:
    """Rows, columns and both at once: each rank adds its own partial product before the base layer's sum."""
    layout = Layout(layout.sizes, tuple(cut for cut in layout.cuts if cut.dim != "expert" and cut.copies == 1))
    x, weight, a, b, dy, held = of_linear(layout)
    y = one_piece(x, weight, a, b)
    y.backward(dy)
    columns, rows = layout.cut_of("in"), layout.cut_of("out")
    dx = torch.zeros_like(x)
    gathered = torch.zeros_like(y)
    for rank in held:
        mine = leaf(x.detach()[:, positions(columns, rank.at[columns.axis])] if columns else x.detach())
        places = positions(rows, rank.at[rows.axis]) if rows else list(range(layout.sizes["out"]))
        local = one_piece(mine, layout.take(weight, W, rank.at), rank.a, rank.b)
        local.backward(dy[:, places])  # of a sum, every share has the sum's gradient
        gathered[:, places] += local.detach()
        into = positions(columns, rank.at[columns.axis]) if columns else list(range(x.shape[1]))
        dx[:, into] += _gradient(mine)  # partial over the axis of the rows, whole over that of the columns
    assert torch.allclose(gathered, y, atol=1e-12)
    assert torch.allclose(dx, x.grad, atol=1e-12)
    check(layout, held, a, b)


@law
@given(layouts())
def test_local_deltas_are_slices_of_the_delta(layout: Layout) -> None:
    """Merging needs no communication, under any cuts and copies."""
    layout = Layout(layout.sizes, tuple(cut for cut in layout.cuts if cut.dim != "expert"), layout.parts)
    _, _, a, b, _, held = of_linear(layout)
    delta = SCALE * b.detach() @ a.detach()
    for rank in held:
        assert torch.allclose(SCALE * rank.b @ rank.a, layout.take(delta, W, rank.at), atol=1e-12)


@law
@given(layouts())
def test_parts_keep_their_own_factors(layout: Layout) -> None:
    """Of a fused weight: the local deltas of the parts, put where their rows are, are the slice of the whole delta."""
    layout = Layout(layout.sizes, tuple(cut for cut in layout.cuts if cut.dim != "expert"), layout.parts)
    deltas = [normal(length, RANK) @ normal(RANK, layout.sizes["in"]) for _, length in layout.parts]
    if not deltas:
        return
    for at in ranks(layout):
        local = torch.full(layout.local_shape(W, (layout.sizes["out"], layout.sizes["in"]), at), torch.nan).double()
        for index, rows in enumerate(layout.part_rows(at)):
            mine = layout.part(index).take(deltas[index], W, at)
            place = 0
            for start, stop in rows:
                local[start:stop] = mine[place : place + stop - start]
                place += stop - start
        assert torch.equal(local, layout.take(torch.cat(deltas), W, at))


@law
@given(dealt("tp", "in", copies=1), st.integers(1, 4))
def test_vocabulary(cut: Cut, width: int) -> None:
    """Ids off a rank look up zeros; the sum over ranks is the lookup."""
    layout = Layout({"out": width, "in": cut.total}, (cut,))
    a, b, dy = leaf(normal(RANK, cut.total)), leaf(normal(width, RANK)), normal(TOKENS, width)
    ids = torch.randint(0, cut.total, (TOKENS,))
    y = SCALE * a.T[ids] @ b.T
    y.backward(dy)
    held = deal(layout, a.detach(), b.detach())
    total = torch.zeros_like(y)
    for rank in held:
        mine = positions(cut, rank.at["tp"])
        found = torch.tensor([[float(token in mine)] for token in ids.tolist()], dtype=torch.float64)
        if mine:
            place = torch.tensor([mine.index(token) if token in mine else 0 for token in ids.tolist()])
            local = SCALE * (rank.a.T[place] * found) @ rank.b.T
            local.backward(dy)
            total += local.detach()
    assert torch.allclose(total, y, atol=1e-12)
    check(layout, held, a, b)


@law
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.sampled_from(["out", "in"]))
def test_sequence_parallelism(out: int, columns: int, size: int, dim: Any) -> None:
    """Tokens are divided over the same axis as the weight: gathered before it, or scattered after it."""
    layout = Layout(
        {"out": out, "in": columns}, (even("tp", dim, layout_length(dim, out, columns), size),), (), ("tp",)
    )
    x, weight, a, b, dy, held = of_linear(layout)
    one_piece(x, weight, a, b).backward(dy)
    cut = layout.cut_of(dim)
    assert cut is not None
    for rank in held:
        mine = positions(cut, rank.at["tp"])
        seen, gradient = (x.detach(), dy[:, mine]) if dim == "out" else (x.detach()[:, mine], dy)
        one_piece(seen, layout.take(weight, W, rank.at), rank.a, rank.b).backward(gradient)
    check(layout, held, a, b)


def layout_length(dim: str, out: int, columns: int) -> int:
    return out if dim == "out" else columns


@law
@given(st.integers(1, 4))
def test_a_layer_in_one_piece_sees_a_share_of_the_tokens(size: int) -> None:
    """A router, say: nothing of it is cut, but each rank of a sequence axis has tokens of its own."""
    layout = Layout({"out": 4, "in": 6}, sequence=("cp",))
    x, weight, a, b, dy, _ = of_linear(layout)
    one_piece(x, weight, a, b).backward(dy)
    held = [Held({"cp": coordinate}, leaf(a.detach()), leaf(b.detach())) for coordinate in range(size)]
    for rank, mine in zip(held, torch.arange(TOKENS).tensor_split(size), strict=True):
        one_piece(x.detach()[mine], weight, rank.a, rank.b).backward(dy[mine])
    check(layout, held, a, b)


@law
@given(orders())
def test_attention_with_copies_of_keys(drawn: tuple[HeadOrder, int, int, int]) -> None:
    """Real attention on every rank's heads: q, k, v and the output projection, each with an adapter."""
    order, heads, kv_heads, _ = drawn
    width, hidden = 2, 4
    layouts_of = {
        "q": Layout({"out": heads * width, "in": hidden}, (order.query_cut("tp", width),)),
        "k": Layout({"out": kv_heads * width, "in": hidden}, (order.kv_cut("tp", width),)),
        "v": Layout({"out": kv_heads * width, "in": hidden}, (order.kv_cut("tp", width),)),
        "o": Layout({"out": hidden, "in": heads * width}, (order.query_cut("tp", width, dim="in"),)),
    }
    x, dy = normal(TOKENS, hidden), normal(TOKENS, hidden)
    weights = {name: normal(layout.sizes["out"], layout.sizes["in"]) for name, layout in layouts_of.items()}
    factors = {
        name: (leaf(normal(RANK, layout.sizes["in"])), leaf(normal(layout.sizes["out"], RANK)))
        for name, layout in layouts_of.items()
    }
    attend(x, {name: one_of(weights[name], *factors[name]) for name in weights}, width).backward(dy)
    held = {name: deal(layouts_of[name], *(f.detach() for f in factors[name])) for name in weights}
    for rank in range(len(order.query)):
        local = {}
        for name, layout in layouts_of.items():
            mine = held[name][rank]
            local[name] = one_of(layout.take(weights[name], W, {"tp": rank}), mine.a, mine.b)
        attend(x, local, width).backward(dy)
    for name, layout in layouts_of.items():
        check(layout, held[name], *factors[name])


def one_of(weight: Tensor, a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: one_piece(x, weight, a, b)


def attend(x: Tensor, layers: dict[str, Callable[[Tensor], Tensor]], width: int) -> Tensor:
    """Grouped-query attention with the heads that the projections give, without knowing of ranks."""
    q, k, v = (layers[name](x).unflatten(-1, (-1, width)).transpose(0, 1) for name in "qkv")
    repeats = len(q) // len(k)
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
    return layers["o"](mixed.transpose(0, 1).flatten(1))


@law
@given(dealt("ep", "expert", copies=1), st.booleans(), st.none() | st.sampled_from(["out", "in"]))
def test_experts(cut: Cut, shared: bool, also: Any) -> None:
    """Adapters of each expert's own, or one for all; the experts may be cut by columns or rows as well."""
    out, columns = 4, 6
    inner = () if also is None else (even("tp", also, layout_length(also, out, columns), 2),)
    layout = Layout({"out": out, "in": columns, "expert": cut.total}, (cut, *inner))
    roles_a, roles_b = (A, B) if shared else (EXPERT_A, EXPERT_B)
    many = () if shared else (cut.total,)
    a, b = leaf(normal(*many, RANK, columns)), leaf(normal(*many, out, RANK))
    tokens = [normal(int(torch.randint(0, 4, ())), columns) for _ in range(cut.total)]
    dys = [normal(len(x), out) for x in tokens]
    for expert, (x, dy) in enumerate(zip(tokens, dys, strict=True)):
        factors = (a, b) if shared else (a[expert], b[expert])
        one_piece(x, torch.zeros(out, columns, dtype=torch.float64), *factors).backward(dy)
    held = deal(layout, a.detach(), b.detach(), roles_a, roles_b)
    for rank in held:
        for place, expert in enumerate(positions(cut, rank.at["ep"])):
            x, dy = tokens[expert], dys[expert]
            x = x[:, positions(inner[0], rank.at["tp"])] if also == "in" else x
            dy = dy[:, positions(inner[0], rank.at["tp"])] if also == "out" else dy
            mine = (rank.a, rank.b) if shared else (rank.a[place], rank.b[place])
            one_piece(x, torch.zeros(dy.shape[1], x.shape[1], dtype=torch.float64), *mine).backward(dy)
    check(layout, held, a, b, roles_a, roles_b)


@pytest.mark.parametrize("roles", [A, B])
def test_copies_sum_by_head_and_not_over_the_whole_axis(roles: Roles) -> None:
    """The ranks of one head have its gradient between them; another head's ranks have none of it."""
    cut = grouped_heads(4, 4, 2).kv_cut("tp", 2)
    layout = Layout({"out": 4, "in": 3}, (cut,))
    assert layout.summed(roles) == ("tp",)
    assert layout.copies(B) == 2
    assert layout.copies(A) == 1
