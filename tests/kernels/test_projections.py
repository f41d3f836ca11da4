"""Every implementation of a linear layer, alone or with others that share its input, is the plain one to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from problems import DTYPES, IN, TOLERANCE, answers, assert_same, draw_x, implementations, item
from torch import Tensor

from lorica.kernels import KERNELS, Dropped, Kernel, Projection, kernel_for, plain, recorded, using

SHAPES = [(7,), (2, 5), (2, 3, 4), (), (0,), (2, 0), (1, 1), (300,)]
LAYERS = [
    pytest.param("projection", kernel, id=f"one-{place}-{kernel.name}")
    for place, kernel in enumerate(implementations("projection"))
]
GROUPS = [
    pytest.param("projections", kernel, id=f"group-{place}-{kernel.name}")
    for place, kernel in enumerate(implementations("projections"))
]


@pytest.fixture(autouse=True)
def _recorded_whatever_the_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "kernel" in request.fixturenames:
        monkeypatch.setattr(recorded, "ELEMENTS", 10**9)


def run_of(op: str, kernel: Kernel, *, ask: bool = True) -> Any:
    """An implementation as one that takes several layers; one that has to fit."""

    def run(x: Tensor, items: Sequence[Projection]) -> Sequence[Tensor]:
        recorded = nullcontext() if kernel.name != "inference" else torch.no_grad()
        with recorded:
            if op == "projections":
                assert not ask or kernel.fits(x, items)
                return kernel.run(x, items)
            assert not ask or all(kernel.fits(x, each) for each in items)
            return [kernel.run(x, each) for each in items]

    return run


def check(op: str, kernel: Kernel, x: Tensor, items: list[Projection], gradients: Any = None) -> None:
    if op == "projection" and any(each.dropped for each in items) and not kernel.fits(x, items[0]):
        with torch.no_grad():
            if not kernel.fits(x, items[0]):
                return
    expected = answers(plain.projections, x, items, gradients)
    found = answers(run_of(op, kernel), x, items, gradients)
    assert_same(found, expected[: len(found)], TOLERANCE[x.dtype])


def group(**fields: Any) -> list[Projection]:
    """Three layers of different widths and ranks, one with a bias."""
    return [
        item(16, 4, bias=True, scaling=2.0, seed=1, **fields),
        item(8, 2, scaling=-0.5, seed=2, **fields),
        item(40, 7, scaling=1.0, seed=3, **fields),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_shapes(op: str, kernel: Kernel, shape: tuple[int, ...]) -> None:
    check(op, kernel, draw_x(*shape), group())
    check(op, kernel, draw_x(*shape), group(dropped=Dropped(0.3, 5)))


@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
@pytest.mark.parametrize("dropped", [None, Dropped(0.3, 5)], ids=["kept", "dropping"])
@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_dtypes(op: str, kernel: Kernel, dtype: torch.dtype, factors: torch.dtype, dropped: Dropped | None) -> None:
    for tokens in (6, 200):
        check(op, kernel, draw_x(2, tokens, dtype=dtype), group(dtype=dtype, factors=factors, dropped=dropped))


@pytest.mark.parametrize("odd", ["weight", "bias", "a", "b"])
@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_each_tensor_may_have_a_dtype_of_its_own(op: str, kernel: Kernel, odd: str) -> None:
    items = [
        each._replace(**{odd: getattr(each, odd).detach().bfloat16().requires_grad_(odd in "ab")})
        for each in group()
        if getattr(each, odd) is not None
    ]
    check(op, kernel, draw_x(3, 5), items)


@pytest.mark.parametrize("r", [1, 2, 3, 8, 63, 64])
@pytest.mark.parametrize("scaling", [-1.5, 0.0, 1.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("op", "kernel"), LAYERS)
def test_ranks_scales_and_biases(op: str, kernel: Kernel, r: int, scaling: float, bias: bool) -> None:
    for tokens in (5, 150):
        check(op, kernel, draw_x(tokens), [item(20, r, bias=bias, scaling=scaling)])


@pytest.mark.parametrize("dropped", [None, Dropped(0.5, 5)], ids=["kept", "dropping"])
@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_inputs_that_lie_otherwise(op: str, kernel: Kernel, dropped: Dropped | None) -> None:
    wide = draw_x(2, 5).detach()
    lying = {
        "columns first": torch.randn(IN, 10).t(),
        "tokens first": torch.randn(5, 2, IN).transpose(0, 1),
        "every other feature": torch.randn(2, 5, 2 * IN)[..., ::2],
        "a part": torch.randn(4, 9, IN)[1:3, 2:7],
        "one row, repeated": wide[:, :1].expand(2, 5, IN),
        "one value, repeated": torch.randn(1, 1).expand(5, IN),
        "features first": torch.randn(2, IN, 5).transpose(1, 2),
    }
    for x in lying.values():
        check(op, kernel, x.requires_grad_(), group(dropped=dropped))


@pytest.mark.parametrize("dropped", [None, Dropped(0.5, 5)], ids=["kept", "dropping"])
@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_gradients_that_lie_otherwise(op: str, kernel: Kernel, dropped: Dropped | None) -> None:
    items = group(dropped=dropped)
    widths = [16, 8, 40]
    lying = {
        "one value": [torch.ones(()).expand(2, 5, width) for width in widths],
        "one row": [torch.randn(width).expand(2, 5, width) for width in widths],
        "features first": [torch.randn(2, width, 5).transpose(1, 2) for width in widths],
        "every other feature": [torch.randn(2, 5, 2 * width)[..., ::2] for width in widths],
    }
    for gradients in lying.values():
        check(op, kernel, draw_x(2, 5), items, gradients)


@pytest.mark.parametrize("dropped", [None, Dropped(0.5, 5)], ids=["kept", "dropping"])
@pytest.mark.parametrize("frozen", ["x", "a", "b", "ab", "xa", "xb", "xab", "first a", "last b"])
@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_what_does_not_train(op: str, kernel: Kernel, frozen: str, dropped: Dropped | None) -> None:
    items, x = group(dropped=dropped), draw_x(2, 5)
    if frozen == "first a":
        items[0].a.requires_grad_(False)
    elif frozen == "last b":
        items[-1].b.requires_grad_(False)
    else:
        x.requires_grad_("x" not in frozen)
        for each in items:
            each.a.requires_grad_("a" not in frozen)
            each.b.requires_grad_("b" not in frozen)
    check(op, kernel, x, items)


@pytest.mark.parametrize("dropped", [None, Dropped(0.5, 5)], ids=["kept", "dropping"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), ()], ids=str)
@pytest.mark.parametrize(("op", "kernel"), GROUPS)
def test_outputs_without_a_part_in_the_loss(
    op: str, kernel: Kernel, used: tuple[int, ...], dropped: Dropped | None
) -> None:
    gradients = [torch.randn(2, 5, width) if place in used else None for place, width in enumerate((16, 8, 40))]
    check(op, kernel, draw_x(2, 5), group(dropped=dropped), gradients)


@pytest.mark.parametrize(("op", "kernel"), GROUPS)
def test_some_of_a_group_drop(op: str, kernel: Kernel) -> None:
    items, x = group(), draw_x(3, 4)
    for place, dropped in ((1, Dropped(0.4, 11)), (0, Dropped(1.0, 12))):
        items[place] = items[place]._replace(dropped=dropped)
        if kernel.fits(x, items):
            check(op, kernel, x, items)
        else:
            assert kernel.name in ("function", "inference"), "one function has one mask for all"


@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_neither_input_nor_weights_nor_gradients_are_written_to(op: str, kernel: Kernel) -> None:
    items, x = group(dropped=None), draw_x(2, 5)
    gradients = [torch.randn(2, 5, width) for width in (16, 8, 40)]
    tensors = [x, *gradients, *(tensor for each in items for tensor in each[:4] if tensor is not None)]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    answers(run_of(op, kernel), x, items, gradients)
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_a_graph_that_is_kept_gives_the_same_twice(op: str, kernel: Kernel) -> None:
    if kernel.name == "inference":
        return
    items, x = group(), draw_x(2, 5)
    total = sum(y.square().sum() for y in run_of(op, kernel)(x, items))
    leaves = [x, *(factor for each in items for factor in (each.a, each.b))]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for ours, again in zip(first, torch.autograd.grad(total, leaves), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize(("op", "kernel"), LAYERS + GROUPS)
def test_a_factor_that_was_written_to_since_is_noticed(op: str, kernel: Kernel) -> None:
    if kernel.name == "inference":
        return
    items, x = group(), draw_x(2, 5)
    total = sum(y.sum() for y in run_of(op, kernel)(x, items))
    with torch.no_grad():
        items[0].b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_last_implementation_is_the_plain_one_and_fits_everything() -> None:
    for op, kernels in KERNELS.items():
        assert kernels[-1].name == "plain", op
        assert sum(kernel.name == "plain" for kernel in kernels) == 1


def test_which_one_is_used() -> None:
    x, one = draw_x(3), item()
    chosen = {kernel.run: kernel.name for kernel in KERNELS["projection"]}
    assert chosen[kernel_for("projection", x, one)] == "function"
    with torch.no_grad():
        assert chosen[kernel_for("projection", x, one)] == "inference"
    with using("plain"):
        assert kernel_for("projection", x, one) is plain.projection
        with using("function"):
            assert chosen[kernel_for("projection", x, one)] == "function"
        assert kernel_for("projection", x, one) is plain.projection
    with using("inference"):
        assert kernel_for("projection", x, one) is plain.projection, "it does not fit where there is a graph"
    with pytest.raises(ValueError, match="there is no implementation 'fast'"), using("fast"):
        pass
