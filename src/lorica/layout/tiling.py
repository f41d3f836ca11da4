"""Whether rectangles make up a whole: every element of it in one of them, none in two, found out in one pass.

Give the element at ``(i, j, …)`` the number ``x^i · y^j · …`` for secret random ``x``, ``y``, … modulo a prime. The sum
over a rectangle is a product of geometric series, so it costs the same whatever its size. The rectangles' sums add up
to the whole's exactly if every element is there once, but for a chance of (the whole's sides, added up) : ``2^89``,
since two different polynomials agree in no more points than that (Schwartz 1980; Zippel 1979).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

_PRIME = 2**89 - 1


def tiles(shape: Sequence[int], boxes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether rectangles cover a tensor, each element once.

    Args:
        shape: the tensor's.
        boxes: first index and size of each, of as many dimensions as the tensor, and inside of it.
    """
    bases = [2 + secrets.randbelow(_PRIME - 2) for _ in shape]
    inverses = [pow(base - 1, -1, _PRIME) for base in bases]

    def weight(offsets: Sequence[int], sizes: Sequence[int]) -> int:
        result = 1
        for base, inverse, offset, size in zip(bases, inverses, offsets, sizes, strict=True):
            series = (pow(base, offset + size, _PRIME) - pow(base, offset, _PRIME)) * inverse
            result = result * series % _PRIME
        return result

    found = sum(weight(offsets, sizes) for offsets, sizes in boxes)
    return (found - weight([0] * len(shape), shape)) % _PRIME == 0


__all__ = ["tiles"]
