"""The leading part of a matrix without its whole decomposition (https://arxiv.org/abs/1504.05477, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.lowrank.decompose import Svd, cut, exact_svd, svd_of_product, wide

#: Rounds with which the stated bound was measured; with fewer it is missed on slowly decaying spectra.
LEAST_ROUNDS = 4
#: Columns of a block at least: a product with fewer costs a processor as much.
LEAST_BLOCK = 16
#: How far the basis may be from orthonormal. Rounding leaves 1e-6; in a space that is used up, noise takes its place.
_SKEW = 3e-6


def columns_for(rank: int, *, rounds: int = LEAST_ROUNDS) -> int:
    """Return how many directions the basis has in the end for ``rank`` of them: a block, and one for each round."""
    return (max(rounds, LEAST_ROUNDS) + 1) * max(rank, LEAST_BLOCK)


def sketched_svd(matrix: Tensor, rank: int, generator: torch.Generator, *, rounds: int = LEAST_ROUNDS) -> Svd:
    """Return the leading ``rank`` values and vectors of a matrix, from a block Krylov space of random directions.

    What is left, ``matrix - U·S·V``, is at most 1.003 times (Frobenius norm) what the exact decomposition leaves:
    measured on flat, slowly and fast decaying spectra and on steps, with :data:`LEAST_ROUNDS` rounds at least.
    ``U·S·V`` is ``matrix·Vᵀ·V``, so what is left is known exactly: ``‖matrix‖² - ‖S‖²``.

    All blocks are kept, so that a block needs no more columns than the rank. Subspace iteration needs twice as many for
    the same bound, in as many products.

    Args:
        matrix: ``[…, out, in]``, float32 or float64. One that is too small for the basis is decomposed exactly.
        rank: how many.
        generator: of the directions, on the CPU.
        rounds: of two products with the matrix each, after the first.
    """
    blocks = max(rounds, LEAST_ROUNDS) + 1
    if columns_for(rank, rounds=rounds) > min(matrix.shape[-2:]):
        return cut(exact_svd(matrix), rank)
    basis_KI, image_OK = _krylov(matrix, max(rank, LEAST_BLOCK), blocks, generator)
    if _skewed(basis_KI):
        basis_KI = torch.linalg.qr(basis_KI.mT).Q.mT
        image_OK = matrix @ basis_KI.mT
    image = wide(image_OK)
    turn_KR = torch.linalg.eigh(image.mT @ image).eigenvectors[..., -rank:].to(matrix)
    return svd_of_product(image_OK @ turn_KR, turn_KR.mT @ basis_KI)


def sketched_eigh(matrix: Tensor, start_KI: Tensor, *, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvalues ``[K]``, falling, and eigenvectors ``[K, in]`` of a symmetric matrix ``[in, in]``
    without negative eigenvalues, by subspace iteration.

    The last of them are not exact: give more directions to start from than are wanted.

    Args:
        matrix: such as ``XᵀX``, of which one product does what two with X do.
        start_KI: directions to start from: random ones, or those of a matrix like this, from which it gets further.
        rounds: of one product each, before the last.
    """
    rows = start_KI
    for _ in range(rounds):
        rows = torch.linalg.qr(matrix @ rows.mT).Q.mT
    core = wide(rows @ (matrix @ rows.mT))
    values, turn = torch.linalg.eigh((core + core.mT) / 2)
    return values.flip(0).clamp(min=0).to(matrix), turn.T.flip(0).to(matrix) @ rows


def _krylov(matrix: Tensor, columns: int, blocks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a basis ``[…, K, in]``, by rows, and ``matrix`` times each of them, ``[…, out, K]``."""
    *lead, out_features, in_features = matrix.shape
    start = torch.empty(*lead, columns, out_features).normal_(generator=generator).to(matrix)
    basis_KI = matrix.new_empty(*lead, blocks * columns, in_features)
    images = [start.mT]
    for held in range(0, blocks * columns, columns):
        rows = images[-1].mT @ matrix
        known = basis_KI[..., :held, :]
        for _ in range(2 if held else 1):  # twice is enough (https://doi.org/10.1007/s00211-005-0615-4)
            if held:
                rows = rows - (rows @ known.mT) @ known
            rows = torch.linalg.qr(rows.mT).Q.mT
        basis_KI[..., held : held + columns, :] = rows
        images.append(matrix @ rows.mT)
    return basis_KI, torch.cat(images[1:], -1)


def _skewed(basis_KI: Tensor) -> bool:
    """Whether rows are not orthonormal: so it ends where a matrix has fewer directions than the basis."""
    gram = basis_KI @ basis_KI.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return not bool((gram.abs() <= _SKEW).all())
