"""Every implementation of grouped products gives what the plain form gives, however the rows are divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels import KERNELS, grouped, kernel_for, using

E, IN, OUT, S = 4, 8, 12, 9
#: Where each expert's rows end: usual, with empty experts, with rows of none behind them, all in one.
DIVISIONS = {
    "usual": (2, 3, 7, 9),
    "empty": (0, 4, 4, 9),
    "behind": (2, 2, 5, 6),
    "one": (0, 0, 9, 9),
    "few": (0, 1, 1, 2),
}
#: Whether torch's own grouped product can take the factors (16 bytes), or the experts are gone through one by one.
RANKS = {"aligned": 4, "unaligned": 3}


def looped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The product of older versions: rows that belong to no expert stay what they happen to be."""
    out, start = x.new_full((len(x), weight.shape[2]), 7.0), 0
    parts = []
    for end, matrix in zip(offs.tolist(), weight, strict=True):
        parts.append(x[start:end] @ matrix)
        start = end
    return torch.cat([*parts, out[start:]])


looped.__name__ = "grouped_mm_fallback"
MULTIPLY = {"torch": F.grouped_mm if hasattr(F, "grouped_mm") else None, "looped": looped}
CASES = [
    pytest.param(multiply, division, rank, shared, id=f"{name}-{division}-{kind}-{'shared' if shared else 'own'}")
    for name, multiply in MULTIPLY.items()
    for division in DIVISIONS
    for kind, rank in RANKS.items()
    for shared in (False, True)
    if multiply is not None
]


def arguments(division: str, r: int, shared: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """``x``, weight, A, B, scaling and offsets; what is differentiated asks for it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    own = () if shared else (E,)
    rows = 2 if division == "few" else S
    x, a, b = (random(*shape).requires_grad_() for shape in ((rows, IN), (*own, r, IN), (*own, OUT, r)))
    offsets = torch.tensor(DIVISIONS[division], dtype=torch.int32)
    return x, random(E, IN, OUT), a, b, 0.5, offsets


def value(y: Tensor, offsets: Tensor) -> Tensor:
    """A fixed function of the rows that belong to experts."""
    y = y[: int(offsets[-1])]
    return (y.square() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()


@pytest.mark.parametrize(("multiply", "division", "r", "shared"), CASES)
def test_every_implementation_gives_what_the_plain_form_gives(multiply, division, r, shared):
    given = arguments(division, r, shared)
    differentiated, offsets = (given[0], given[2], given[3]), given[-1]
    expected = grouped.plain(multiply, *given)
    wanted = torch.autograd.grad(value(expected, offsets), differentiated)
    rows = int(offsets[-1])
    with torch.no_grad():
        torch.testing.assert_close(grouped.inference(multiply, *given)[:rows], expected[:rows])
    y = grouped.function(multiply, *given)
    torch.testing.assert_close(y[:rows], expected[:rows])
    (dx, *found), (other_dx, *others) = torch.autograd.grad(value(y, offsets), differentiated), wanted
    torch.testing.assert_close(dx[:rows], other_dx[:rows])
    torch.testing.assert_close(found, others)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2)], ids=["x", "a", "b", "x and a", "x and b"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_what_does_not_train_gets_no_gradient_and_is_not_kept(frozen, shared):
    given = arguments("usual", 4, shared)
    differentiated = [given[0], given[2], given[3]]
    for index in frozen:
        differentiated[index].requires_grad_(False)
    trains = [tensor for tensor in differentiated if tensor.requires_grad]
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = grouped.function(looped, *given)
    assert (kept.count((S, IN)) == 1) == (1 not in frozen)
    assert (kept.count((S, 4)) == 1) == (2 not in frozen)
    wanted = torch.autograd.grad(value(grouped.plain(looped, *given), given[-1]), trains)
    for mine, other in zip(torch.autograd.grad(value(y, given[-1]), trains), wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_second_derivatives_are_the_plain_forms():
    """Also where A was computed from what x was computed from: each path is counted once."""
    found = []
    for implementation in ("function", "plain"):
        x, weight, a, b, scaling, offsets = arguments("empty", 4, shared=False, dtype=torch.float64)
        seed = torch.ones((), dtype=torch.float64, requires_grad=True)
        later = a * seed
        x = x * later.square().sum()
        y = getattr(grouped, implementation)(looped, x, weight, later, b, scaling, offsets)
        first = torch.autograd.grad(value(y, offsets), (seed, b), create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0] + first[1].square().sum(), (seed, a, b))])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_second_derivative_without_the_input_is_refused():
    given = arguments("usual", 4, shared=False)
    given[2].requires_grad_(False)
    y = grouped.function(looped, *given)
    with pytest.raises(RuntimeError, match=r"input, which is not kept.*using\('plain'\)"):
        torch.autograd.grad(value(y, given[-1]), given[0], create_graph=True)


def test_factors_follow_the_dtype_of_the_input():
    x, weight, a, b, scaling, offsets = arguments("usual", 4, shared=False)
    y = grouped.function(looped, x.detach().bfloat16(), weight.bfloat16(), a, b, scaling, offsets)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), grouped.plain(looped, x, weight, a, b, scaling, offsets), atol=0.2, rtol=0.03)
    gradients = torch.autograd.grad(y.float().sum(), (a, b))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_which_implementation_is_chosen():
    """Transformations of functions take the plain form; so does whoever asks for it."""
    x, weight, a, b, scaling, offsets = arguments("usual", 4, shared=False)
    chosen: list[str] = []

    def names(x: Tensor) -> Tensor:
        fitting = [k.name for k in KERNELS["grouped"] if k.fits(looped, x, weight, a, b, scaling, offsets)]
        chosen.append(fitting[0])
        return x.sum()

    names(x)
    with torch.no_grad():
        names(x)
    torch.func.grad(names)(x.detach())
    with torch.autograd.forward_ad.dual_level():
        names(x)
    assert chosen == ["function", "inference", "plain", "plain"]
    with using("plain"):
        assert kernel_for("grouped", looped, x, weight, a, b, scaling, offsets) is grouped.plain


def test_a_forward_needs_no_second_matrix_of_the_outputs_size():
    """The low-rank part is added into the base product's output."""
    given = arguments("usual", 4, shared=False)
    made: list[int] = []

    def multiply(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        y = looped(x, weight, offs)
        made.append(y.data_ptr())
        return y

    multiply.__name__ = "grouped_mm_fallback"
    with torch.no_grad():
        assert grouped.inference(multiply, *given).data_ptr() == made[0]
    assert grouped.function(multiply, *given).data_ptr() == made[1]
