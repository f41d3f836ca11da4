"""Decompositions through a small core are those of the dense matrix, which is the oracle here, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica.lowrank import Pair, cut, exact_svd, padded, rank_of_energy, signs, stacked, svd_of_product


def pairs(*ranks: int, lead: tuple[int, ...] = (), out: int = 24, inside: int = 40, seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    return [Pair(draw(out, r), draw(r, inside)) for r in ranks]


def dense(given: list[Pair], weights: list[float]) -> Tensor:
    return sum(w * pair.left @ pair.right for pair, w in zip(given, weights, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("ranks", [(4, 6), (1,), (20, 30), (40, 40)], ids=str)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_truncated_sum_is_the_nearest_matrix_of_its_rank(ranks: tuple[int, ...], lead: tuple[int], rank: int):
    given, weights = pairs(*ranks, lead=lead), [0.7, -1.3][: len(ranks)]
    whole = dense(given, weights)
    found = cut(svd_of_product(*stacked(given, weights)), rank)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    kept = min(rank, sum(ranks))
    expected = (u[..., :kept] * s[..., None, :kept]) @ v[..., :kept, :]
    assert torch.allclose((found.u * found.s.unsqueeze(-2)) @ found.v, expected, atol=1e-12 * float(whole.norm()))
    assert torch.allclose(found.s, s[..., : found.s.shape[-1]], atol=1e-12 * float(whole.norm()))


def test_vectors_are_orthonormal_and_their_signs_are_settled():
    given = pairs(5, 3, lead=(2,))
    found = svd_of_product(*stacked(given, [1.0, 2.0]))
    eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    assert torch.allclose(found.u.mT @ found.u, eye, atol=1e-12)
    assert torch.allclose(found.v @ found.v.mT, eye, atol=1e-12)
    assert bool((signs(found.u) == 1).all())
    turned = svd_of_product(*stacked([Pair(-p.left, -p.right) for p in given], [1.0, 2.0]))
    assert torch.allclose(turned.u, found.u, atol=1e-9)
    assert torch.allclose(turned.v, found.v, atol=1e-9)
    assert torch.allclose(exact_svd(dense(given, [1.0, 2.0])).u[..., :8], found.u, atol=1e-9)


def test_nothing_out_times_in_is_formed():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    given = pairs(4, 4, out=512, inside=768)
    with Largest() as largest:
        svd_of_product(*stacked(given, [1.0, 1.0]))
    assert largest.elements <= 8 * 768


def test_padding_changes_the_rank_and_not_the_matrix():
    (pair,) = pairs(3, lead=(2,))
    wider = padded(pair, 7)
    assert (wider.left.shape[-1], wider.right.shape[-2]) == (7, 7)
    assert torch.equal(wider.left @ wider.right, pair.left @ pair.right)
    with pytest.raises(ValueError, match="rank 3 is none of rank 2"):
        padded(pair, 2)


def test_the_rank_of_an_energy_is_the_least_that_reaches_it():
    s = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1: shares 0.64, 0.8, 0.96, 1
    assert [rank_of_energy(s, share) for share in (0.1, 0.64, 0.65, 0.8, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert rank_of_energy(torch.stack([s, torch.tensor([5.0, 0.1, 0.1, 0.1])]), 0.9) == 3
    assert rank_of_energy(s[:2], 0.9, total=25.0) == 2
    assert rank_of_energy(torch.zeros(4), 0.9) == 1
