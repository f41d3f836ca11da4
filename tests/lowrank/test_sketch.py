"""The stated bound of the sketch, over spectra and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica.lowrank import columns_for, cut, exact_svd, sketched_svd

BOUND = 1.003
SPECTRA = {
    "random": lambda n: None,
    "flat": lambda n: torch.ones(n),
    "slow": lambda n: torch.arange(1, n + 1.0) ** -0.25,
    "harmonic": lambda n: 1 / torch.arange(1, n + 1.0),
    "exponential": lambda n: 0.97 ** torch.arange(1, n + 1.0),
    "step": lambda n: torch.cat([torch.ones(20), torch.full((n - 20,), 0.1)]),
    "ramp": lambda n: torch.linspace(1, 0.3, n),
    "spiked": lambda n: torch.cat([torch.linspace(10, 2, 12), torch.linspace(1, 0.5, n - 12)]),
}


def matrix(spectrum: str, out: int, inside: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = min(out, inside)
    values = SPECTRA[spectrum](n)
    if values is None:
        return torch.randn(out, inside, generator=generator)
    u, v = (torch.linalg.qr(torch.randn(side, n, generator=generator, dtype=torch.float64)).Q for side in (out, inside))
    return ((u * values.double()) @ v.T).float()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("out", "inside"), [(384, 384), (256, 512), (512, 256)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 48])
def test_what_is_left_is_near_the_least_that_can_be_left(spectrum: str, out: int, inside: int, rank: int):
    for seed in range(3):
        given = matrix(spectrum, out, inside, seed)
        u, s, v = sketched_svd(given, rank, torch.Generator().manual_seed(seed + 10))
        left = (given.double() - (u.double() * s.double()) @ v.double()).norm()
        least = exact_svd(given.double()).s[rank:].norm()
        assert left <= BOUND * least
        stated = (given.double().square().sum() - s.double().square().sum()).clamp_min(0).sqrt()
        assert abs(float(stated / left) - 1) < 1e-3


@pytest.mark.parametrize("spectrum", [0.5, 0.8, 0.0], ids=str)
@pytest.mark.parametrize("rank", [4, 16, 40])
def test_a_space_that_is_used_up_leaves_no_more_than_rounding(spectrum: float, rank: int):
    """Steep spectra, and 20 directions in all: the basis has more than the matrix."""
    n = 384
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(s))).Q for s in (0, 1))
    values = spectrum ** torch.arange(n) if spectrum else (torch.arange(n) < 20).float()
    given = (u * values) @ v.T
    for spread in (given, torch.diag(values), torch.zeros(n, n)):
        u, s, v = sketched_svd(spread, rank, torch.Generator().manual_seed(7))
        scale = float(spread.norm())
        left = (spread - (u * s) @ v).norm()
        assert left <= BOUND * values[rank:].norm() + 1e-5 * scale
        assert torch.allclose(u.T @ u, torch.eye(rank), atol=1e-5)
        assert torch.allclose(v @ v.T, torch.eye(rank), atol=1e-5)


def test_a_matrix_that_is_smaller_than_the_basis_is_decomposed_exactly():
    given = matrix("slow", columns_for(5) - 1, 200, 0)
    u, s, v = sketched_svd(given, 5, torch.Generator().manual_seed(0))
    exact = cut(exact_svd(given), 5)
    assert torch.equal(s, exact.s)
    assert torch.equal(u, exact.u)
    assert torch.equal(v, exact.v)


@pytest.mark.parametrize("rounds", [0, 4, 6])
def test_products_with_the_matrix_are_two_for_each_round_and_two(rounds: int):
    given = matrix("random", 384, 256, 0)
    whole = given.untyped_storage().data_ptr()

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            read = [x for x in args if isinstance(x, Tensor) and x.untyped_storage().data_ptr() == whole]
            self.seen += bool(read) and function.overloadpacket is torch.ops.aten.mm
            return function(*args, **(kwargs or {}))

    with Products() as products:
        sketched_svd(given, 16, torch.Generator().manual_seed(0), rounds=rounds)
    assert products.seen == 2 * (1 + max(rounds, 4))


def test_a_stack_is_decomposed_one_by_one():
    given = torch.stack([matrix("slow", 96, 128, seed) for seed in range(3)])
    u, s, v = sketched_svd(given, 5, torch.Generator().manual_seed(0))
    for index, one in enumerate(given):
        left = (one - (u[index] * s[index]) @ v[index]).norm()
        assert left <= BOUND * exact_svd(one.double()).s[5:].norm()
