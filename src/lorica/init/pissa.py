"""PiSSA: the factors are the principal part of the base weight (https://arxiv.org/abs/2404.02948)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.init.base import Factors, InitRequest, register, target_generator
from lorica.init.random import start_embedding

#: Subspace iterations that the fast form makes at least: with fewer it misses its bound on slowly decaying spectra.
LEAST_ITERATIONS = 4

Decompose = Callable[[Tensor, InitRequest], tuple[Tensor, Tensor, Tensor]]


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
    sign = _sign(u_OR)
    root = (s_R / request.scaling).sqrt()
    a, b = (sign * root).unsqueeze(-1) * v_RI, u_OR * (sign * root).unsqueeze(-2)
    return Factors(a, b, zero_bias(request))


def _sign(u_OR: Tensor) -> Tensor:
    # A pair of singular vectors is known up to its sign; the largest entry of the left one is made positive.
    largest = u_OR.gather(-2, u_OR.abs().argmax(-2, keepdim=True)).squeeze(-2)
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


@register("pissa", subtracts=True)
def pissa(request: InitRequest) -> Factors:
    """``s·B·A`` is the truncated singular value decomposition of the base weight, which keeps the rest.

    ``A = √(S/s)·Vᵀ`` and ``B = U·√(S/s)``. Embeddings start as by default and keep their weight.

    Raises:
        ConfigError: the target is a convolution, the rank larger than a side of the weight, or the scale not positive.
    """
    return _principal(_exact, request)


def _exact(weight: Tensor, request: InitRequest) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[..., : request.r], s[..., : request.r], v[..., : request.r, :]


@register("pissa_niter_N", subtracts=True)
def pissa_niter(request: InitRequest) -> Factors:
    """PiSSA by randomised subspace iteration, in ``N`` rounds (at least :data:`LEAST_ITERATIONS`).

    What is left of the weight is at most 1.003 times (Frobenius norm) what the exact decomposition leaves, measured on
    flat, slowly and fast decaying spectra; twice the rank is iterated for it (https://arxiv.org/abs/0909.4061). A file
    says nothing of the weight that was left, so that loading one computes it again: the directions to start from
    depend on the target's name alone, and not on the seed.

    Raises:
        ConfigError: as :func:`pissa`.
    """
    return _principal(_iterated, request)


def _iterated(weight: Tensor, request: InitRequest) -> tuple[Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape[-2:]
    columns = min(request.r + max(request.r, 8), out_features, in_features)
    generator = target_generator(0, request.target)
    start = torch.empty(*weight.shape[:-2], in_features, columns).normal_(generator=generator)
    basis = torch.linalg.qr(weight @ start.to(weight)).Q
    for _ in range(max(request.number, LEAST_ITERATIONS)):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
    return (basis @ u)[..., : request.r], s[..., : request.r], v[..., : request.r, :]
