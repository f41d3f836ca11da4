"""Low-rank algebra: pure functions on matrices ``L·R`` that are never multiplied out.

A sum of products is a product of stacked factors, ``Σ wᵢ·Lᵢ·Rᵢ = [w₁L₁ … ]·[R₁; …]``, and the singular value
decomposition of a product is that of a small core between two orthonormal bases. Everything takes leading dimensions,
so that a stack of experts is one call.
"""

from lorica.lowrank.decompose import Svd, cut, exact_svd, rank_of_energy, signs, svd_of_product, wide
from lorica.lowrank.sketch import LEAST_ROUNDS, columns_for, sketched_eigh, sketched_svd
from lorica.lowrank.sums import Pair, padded, stacked

__all__ = [
    "LEAST_ROUNDS",
    "Pair",
    "Svd",
    "columns_for",
    "cut",
    "exact_svd",
    "padded",
    "rank_of_energy",
    "signs",
    "sketched_eigh",
    "sketched_svd",
    "stacked",
    "svd_of_product",
    "wide",
]
