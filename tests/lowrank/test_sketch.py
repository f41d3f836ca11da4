"""The stated bound of the sketch, over spectra and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica.lowrank import exact_svd, sketched_svd

BOUND = 1.003
SPECTRA = {
    "random": lambda n: None,
    "flat": lambda n: torch.ones(n),
    "slow": lambda n: torch.arange(1, n + 1.0) ** -0.25,
    "harmonic": lambda n: 1 / torch.arange(1, n + 1.0),
    "exponential": lambda n: 0.97 ** torch.arange(1, n + 1.0),
    "step": lambda n: torch.cat([torch.ones(20), torch.full((n - 20,), 0.1)]),
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
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_what_is_left_is_near_the_least_that_can_be_left(spectrum: str, out: int, inside: int, rank: int):
    for seed in range(3):
        given = matrix(spectrum, out, inside, seed)
        u, s, v = sketched_svd(given, rank, torch.Generator().manual_seed(seed + 10))
        left = (given.double() - (u.double() * s.double()) @ v.double()).norm()
        least = exact_svd(given.double()).s[rank:].norm()
        assert left <= BOUND * least
        stated = (given.double().square().sum() - s.double().square().sum()).clamp_min(0).sqrt()
        assert abs(float(stated / left) - 1) < 1e-3


def test_a_stack_is_decomposed_one_by_one():
    given = torch.stack([matrix("slow", 64, 96, seed) for seed in range(3)])
    u, s, v = sketched_svd(given, 5, torch.Generator().manual_seed(0))
    for index, one in enumerate(given):
        left = (one - (u[index] * s[index]) @ v[index]).norm()
        assert left <= BOUND * exact_svd(one.double()).s[5:].norm()
