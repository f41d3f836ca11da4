"""PiSSA: the factors are the principal part of the base weight (https://arxiv.org/abs/2404.02948)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.init.base import Factors, InitRequest, register, target_generator
from lorica.init.random import start_embedding
from lorica.lowrank import Svd, cut, exact_svd, sketched_svd

Decompose = Callable[[Tensor, InitRequest], Svd]


def weight_of(request: InitRequest) -> Tensor:
    """Return the base weight ``[…, out, in]`` in the precision to compute in (float32; float64 stays).

    Raises:
        ConfigError: the target is no matrix, or the rank is larger than a side of it; the module is named.
    """
    weight = request.weight()
    out_features, in_features = weight.shape[-2:]
    lead = weight.shape[:-2]
    r = request.r
    if request.shape_a != (*lead, r, in_features) or request.shape_b != (*lead, out_features, r):
        raise ConfigError(
            f"{request.target}: an initialisation from the base weight needs a linear layer, got a weight of shape "
            f"{tuple(weight.shape)} and A of shape {tuple(request.shape_a)}"
        )
    if r > min(out_features, in_features):
        raise ConfigError(
            f"{request.target}: a weight of {out_features} × {in_features} has no {r} directions to start the factors "
            "from; choose a smaller rank (rank_pattern sets it for this layer alone)"
        )
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def zero_bias(request: InitRequest) -> Tensor | None:
    """Return the bias of B to start with, if there is one."""
    return torch.zeros(request.shape_b[:-1]) if request.bias else None


def _principal(decompose: Decompose, request: InitRequest) -> Factors:
    if request.lookup:
        return start_embedding(request)
    if request.scaling <= 0:
        raise ConfigError(f"{request.target}: PiSSA needs a positive scale (lora_alpha), got {request.scaling}")
    u_OR, s_R, v_RI = decompose(weight_of(request), request)
    root = (s_R / request.scaling).sqrt()
    return Factors(root.unsqueeze(-1) * v_RI, u_OR * root.unsqueeze(-2), zero_bias(request))


@register("pissa", subtracts=True)
def pissa(request: InitRequest) -> Factors:
    """``s·B·A`` is the truncated singular value decomposition of the base weight, which keeps the rest.

    ``A = √(S/s)·Vᵀ`` and ``B = U·√(S/s)``. Embeddings start as by default and keep their weight.

    Raises:
        ConfigError: the target is a convolution, the rank larger than a side of the weight, or the scale not positive.
    """
    return _principal(_exact, request)


def _exact(weight: Tensor, request: InitRequest) -> Svd:
    return cut(exact_svd(weight), request.r)


@register("pissa_niter_N", subtracts=True)
def pissa_niter(request: InitRequest) -> Factors:
    """PiSSA from a random block Krylov space, in ``N`` rounds (at least :data:`lorica.lowrank.LEAST_ROUNDS`).

    What is left of the weight is at most 1.003 times (Frobenius norm) what the exact decomposition leaves
    (:func:`lorica.lowrank.sketched_svd`). A file says nothing of the weight that was left, so that loading one computes
    it again: the directions to start from depend on the target's name alone, and not on the seed.

    Raises:
        ConfigError: as :func:`pissa`.
    """
    return _principal(_iterated, request)


def _iterated(weight: Tensor, request: InitRequest) -> Svd:
    return sketched_svd(weight, request.r, target_generator(0, request.target), rounds=request.number)
