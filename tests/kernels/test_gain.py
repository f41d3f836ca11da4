"""What multiplies each output of a layer: every implementation is the plain one to rounding."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from problems import TOLERANCE, assert_same, implementations
from torch import Tensor

from lorica.kernels import KERNELS, Kernel, gain, kernel_for, using

IMPLEMENTATIONS = [pytest.param(kernel, id=kernel.name) for kernel in implementations("gain")]
# Shape of the layer's output, and of the gain: one number for every output, last or second.
SHAPES = [
    ((7, 6), (6,)),
    ((2, 5, 6), (6,)),
    ((6,), (6,)),
    ((0, 6), (6,)),
    ((4, 1), (1,)),
    ((2, 6, 5), (6, 1)),
    ((2, 6, 3, 4), (6, 1, 1)),
    ((6, 3, 4), (6, 1, 1)),
    ((2, 1, 3, 4), (1, 1, 1)),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
]


def problem(
    shape: tuple[int, ...] = (3, 5, 6),
    outputs: tuple[int, ...] = (6,),
    dtype: torch.dtype = torch.float32,
    wide: torch.dtype = torch.float32,
    *,
    rest: bool = True,
) -> list[Tensor | None]:
    """An output, a gain near 1, and what is added."""
    generator = torch.Generator().manual_seed(4)
    z, factor, shift = (torch.randn(each, generator=generator) for each in (shape, outputs, outputs))
    leaves = [z.to(dtype), (1 + 0.1 * factor).to(wide), shift.to(wide) if rest else None]
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves]


def answers(run: Any, leaves: list[Tensor | None], g: Tensor | None = None) -> list[Tensor | None]:
    """The result, and the gradients by what needs one."""
    y = run(*leaves)
    if not y.requires_grad:
        return [y]
    if g is None:
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


def check(kernel: Kernel, leaves: list[Tensor | None], g: Tensor | None = None) -> None:
    expected = answers(gain.plain, leaves, g)
    with torch.no_grad() if kernel.name == "inference" else nullcontext():
        assert kernel.fits(*leaves)
        found = answers(kernel.run, leaves, g)
    assert_same(found, expected[: len(found)], TOLERANCE[leaves[0].dtype])


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES, ids=str)
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_shapes(kernel: Kernel, shape: tuple[int, ...], outputs: tuple[int, ...], rest: bool) -> None:
    check(kernel, problem(shape, outputs, rest=rest))


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize(("dtype", "wide"), DTYPES, ids=str)
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_dtypes(kernel: Kernel, dtype: torch.dtype, wide: torch.dtype, rest: bool) -> None:
    check(kernel, problem((40, 6), dtype=dtype, wide=wide, rest=rest))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_what_does_not_train(kernel: Kernel, frozen: tuple[int, ...]) -> None:
    leaves = problem()
    for place in frozen:
        leaves[place].requires_grad_(False)
    check(kernel, leaves)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_outputs_and_gradients_that_lie_otherwise(kernel: Kernel) -> None:
    _, factor, shift = problem()
    for z in (torch.randn(6, 5, 3).permute(2, 1, 0), torch.randn(3, 5, 12)[..., ::2], torch.randn(6).expand(3, 5, 6)):
        for g in (torch.ones(()).expand(z.shape), torch.randn(*z.shape[:-2], 6, z.shape[-2]).mT):
            check(kernel, [z.detach().requires_grad_(), factor, shift], g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [*IMPLEMENTATIONS, pytest.param(KERNELS["gain"][-1], id="plain")])
def test_a_gain_of_one_changes_no_bit_and_one_near_it_is_not_rounded(kernel: Kernel, dtype: torch.dtype) -> None:
    z = torch.linspace(1, 1000, 1200).view(200, 6).to(dtype)
    with torch.no_grad():
        assert torch.equal(kernel.run(z, torch.ones(6), torch.zeros(6)), z)
        near = kernel.run(z, torch.full((6,), 1 + 3 * 2**-10), None)  # 1 in bf16
    assert not torch.equal(near, z)
    assert near.double().mean() / z.double().mean() == pytest.approx(1 + 3 * 2**-10, abs=2**-9)


def test_the_gain_of_many_bf16_tokens_is_summed_in_float32() -> None:
    z, factor, _ = problem((4096, 6), dtype=torch.bfloat16, rest=False)
    g = torch.rand(4096, 6).bfloat16()
    _, _, found = answers(gain.scaled, [z, factor, None], g)
    expected = (g.double() * z.detach().double()).sum(0)
    assert (found.double() - expected).abs().max() < 0.3  # a bf16 sum has lost units by then


@pytest.mark.parametrize("rest", [True, False])
def test_second_derivatives(rest: bool) -> None:
    leaves = [leaf for leaf in problem((4, 6), dtype=torch.float64, wide=torch.float64, rest=rest) if leaf is not None]

    def run(*tensors: Tensor) -> Tensor:
        return gain.scaled(*tensors) if rest else gain.scaled(*tensors, None)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_whoever_gets_the_output_may_write_over_it() -> None:
    leaves = problem()
    expected = answers(lambda *tensors: gain.plain(*tensors).relu(), leaves)
    assert_same(answers(lambda *tensors: gain.scaled(*tensors).relu_(), leaves), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_nothing_is_written_to(kernel: Kernel) -> None:
    leaves = problem()
    before = [(leaf, leaf.detach().clone(), leaf._version) for leaf in leaves]
    with torch.no_grad() if kernel.name == "inference" else nullcontext():
        answers(kernel.run, leaves, torch.randn(3, 5, 6))
    for leaf, values, version in before:
        assert torch.equal(leaf, values)
        assert leaf._version == version


def test_the_output_is_kept_only_for_a_gain_that_trains() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for trains in (True, False):
        z, factor, shift = problem()
        factor.requires_grad_(trains)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gain.scaled(z, factor, shift)
        assert any(tensor.data_ptr() == z.data_ptr() for tensor in kept) is trains


def test_which_one_is_used() -> None:
    leaves = problem()
    assert kernel_for("gain", *leaves) is gain.scaled
    with torch.no_grad():
        assert kernel_for("gain", *leaves) is gain.inference
    with using("plain"):
        assert kernel_for("gain", *leaves) is gain.plain
    found = torch.func.vmap(lambda z: kernel_for("gain", z, *leaves[1:])(z, *leaves[1:]))(leaves[0])
    assert_same([found], [gain.plain(*leaves)], TOLERANCE[torch.float32])
