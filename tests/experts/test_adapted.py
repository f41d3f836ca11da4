"""A weight with low-rank deltas gives, in every product and view, what the sum would give."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.config import AdapterSpec
from lorica.ops.adapted import AdaptedWeight, Delta

E, ROWS, COLS, R = 3, 8, 12, 4
OFFSETS = torch.tensor([2, 2, 7], dtype=torch.int32)


def host(training: bool = False) -> SimpleNamespace:
    return SimpleNamespace(site=None, training=training, target_name="mlp.experts.w")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def adapted(*lead: int, shared: bool = False, r: int = R) -> tuple[AdaptedWeight, Tensor, list[Tensor]]:
    """A weight with two deltas, the sum, and the factors."""
    weight = torch.randn(*lead, ROWS, COLS, dtype=torch.float64)
    own = () if shared else lead
    deltas, total = [], weight
    for scale in (2.0, -0.5):
        left, right = random(*own, ROWS, r), random(*own, r, COLS)
        deltas.append(Delta(left, right, AdapterSpec(r, 1, scale), host()))  # type: ignore[arg-type]
        total = total + scale * (left @ right)
    return AdaptedWeight(weight, deltas), total, [factor for delta in deltas for factor in delta[:2]]


def same(actual: Tensor, expected: Tensor, factors: list[Tensor]) -> None:
    """Equal values, and equal gradients of a fixed function."""
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).view(actual.shape)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), factors, retain_graph=True) for y in (actual, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


MATRIX = {
    "linear": lambda w: F.linear(X[:, :COLS], w, BIAS[:ROWS]),
    "linear of three dimensions": lambda w: F.linear(X[:6, :COLS].view(2, 3, COLS), w),
    "x @ w": lambda w: X[:, :ROWS] @ w,
    "w @ x": lambda w: w @ X[:, :COLS].T,
    "mm": lambda w: torch.mm(X[:, :ROWS], w),
    "transposed": lambda w: X[:, :COLS] @ w.T,
    "t": lambda w: X[:, :COLS] @ w.t(),
    "transpose": lambda w: X[:, :COLS] @ w.transpose(0, 1),
}
STACK = {
    "one expert": lambda w: F.linear(X[:, :COLS], w[1]) + F.linear(X[:, :COLS], w[torch.tensor(2)]),
    "one expert, transposed": lambda w: X[:, :COLS] @ w[0].T,
    "x @ one": lambda w: X[:, :ROWS] @ w[-1],
    "cast": lambda w: F.linear(X[:, :COLS], w[1].to(torch.float64)) + F.linear(X[:, :COLS], w.contiguous()[2]),
    "bmm": lambda w: torch.bmm(X[:6, :ROWS].reshape(E, 2, ROWS), w),
    "batched by token": lambda w: torch.bmm(w[IDS], X[: len(IDS), :COLS].unsqueeze(-1)),
    "batched by token, transposed": lambda w: torch.bmm(X[: len(IDS), :ROWS].unsqueeze(1), w[IDS]),
    "mT": lambda w: torch.bmm(X[:6, :COLS].reshape(E, 2, COLS), w.mT),
}
X = torch.randn(7, COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([2, 0, 0, 1])


@pytest.mark.parametrize("name", MATRIX)
def test_products_of_a_matrix(name):
    weight, total, factors = adapted()
    same(MATRIX[name](weight), MATRIX[name](total), factors)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("name", STACK)
def test_products_of_a_stack(name, shared):
    weight, total, factors = adapted(E, shared=shared)
    same(STACK[name](weight), STACK[name](total), factors)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("r", [R, 3], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("turned", [False, True], ids=["in-out", "out-in"])
def test_grouped_products(turned, r, shared):
    weight, total, factors = adapted(E, shared=shared, r=r)
    weight = AdaptedWeight(weight.weight.float(), weight.deltas)
    x = X[:, : COLS if turned else ROWS].float()
    y = F.grouped_mm(x, weight.transpose(-2, -1) if turned else weight, offs=OFFSETS)
    matrices = (total.float().mT if turned else total.float()).unbind(0)
    expected = torch.cat([x[:2] @ matrices[0], x[2:] @ matrices[2]])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(out.square().sum(), factors) for out in (y, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_what_is_no_product_forms_the_sum_and_says_so():
    weight, total, factors = adapted(E)
    with pytest.warns(UserWarning, match=r"mlp\.experts\.w: einsum is not known"):
        same(torch.einsum("ti,eoi->teo", X, weight), torch.einsum("ti,eoi->teo", X, total), factors)
    with pytest.warns(UserWarning, match="chunk is not known"):
        same(weight.chunk(2, dim=-1)[0], total.chunk(2, dim=-1)[0], factors)
    with pytest.warns(UserWarning, match="indexing is not known"):
        same(weight[:, 1:3], total[:, 1:3], factors)


def test_what_a_delta_does_not_change_is_the_weights():
    weight, total, _ = adapted(E)
    assert weight.shape == total.shape
    assert (weight.dtype, weight.device, weight.ndim, weight.dim()) == (total.dtype, total.device, 3, 3)
    assert weight.size(-1) == COLS
    assert len(weight) == E


def test_every_forward_takes_a_stack_apart_once():
    """Indexing a factor expert by expert would make a whole stack of zeros for each in backward."""
    weight, _, _ = adapted(E)
    assert weight[0].deltas[0].left.grad_fn is weight[1].deltas[0].left.grad_fn
    assert "Unbind" in type(weight[0].deltas[0].left.grad_fn).__name__


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_scales_what_it_keeps(position):
    """The mean over many masks is the part without dropout; the base product is never dropped."""
    x, weight = torch.randn(4, COLS, dtype=torch.float64), torch.randn(ROWS, COLS, dtype=torch.float64)
    left, right = random(ROWS, R), random(R, COLS)
    spec = AdapterSpec(R, 1, 0.5, dropout=0.5, dropout_position=position)  # type: ignore[arg-type]
    plain = F.linear(x, weight + 0.5 * left @ right)
    mean = torch.zeros_like(plain)
    with torch.no_grad():
        for _ in range(4000):
            mean += F.linear(x, AdaptedWeight(weight, [Delta(left, right, spec, host(training=True))])) / 4000  # type: ignore[arg-type]
    assert float((mean - plain).detach().norm() / plain.detach().norm()) < 0.05
    off = F.linear(x, AdaptedWeight(weight, [Delta(left, right, spec, host())]))  # type: ignore[arg-type]
    torch.testing.assert_close(off, plain)
