"""MiCA: B is frozen along the base weight's minor directions, A learns what to do there
(https://arxiv.org/abs/2604.01694)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.init.base import Factors, InitRequest, register


@register("mica", freezes=("b",), reads_weight=True)
def mica(request: InitRequest) -> Factors:
    """``B`` is the ``r`` left singular vectors with the smallest singular values, ``A`` is zero.

    Of an embedding ``[V, d]`` they are those of its transpose. The kernel of a convolution counts as input.

    Raises:
        ConfigError: the rank is larger than a side of the weight, or the factors have not plain LoRA's shapes.
    """
    u_OR, _, _ = minor_directions(request)
    bias = torch.zeros(request.shape_b[0]) if request.bias else None
    return Factors(torch.zeros(request.shape_a), u_OR.reshape(request.shape_b), bias)


def minor_directions(request: InitRequest, *, least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last ``r`` singular vectors and values of the base weight: ``[out, r]``, ``[r]``, ``[r, in]``.

    Their signs are what the routine makes them. In float32, float64 stays.

    Args:
        request: whose weight and rank.
        least: how many directions are to be left.

    Raises:
        ConfigError: there are not so many directions, or the factors have not plain LoRA's shapes.
    """
    weight = request.weight()
    matrix = weight.T if request.lookup else weight.flatten(1)
    shapes = (request.shape_a[1:].numel(), request.shape_b[0], request.shape_b[1])
    if shapes != (matrix.shape[1], matrix.shape[0], request.r):
        raise ConfigError(
            f"{request.target}: an initialisation from the base weight needs plain LoRA's factors for it, got a weight "
            f"of shape {tuple(weight.shape)}, A of {tuple(request.shape_a)} and B of {tuple(request.shape_b)}"
        )
    sides = min(matrix.shape)
    if request.r + least > sides:
        raise ConfigError(
            f"{request.target}: a weight of {matrix.shape[0]} × {matrix.shape[1]} has {sides} directions, from which "
            f"r={request.r} cannot be taken{' so that one is left' if least else ''}; choose a smaller rank "
            "(rank_pattern sets it for this layer alone)"
        )
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return u[:, -request.r :], s[-request.r :], v[-request.r :]
