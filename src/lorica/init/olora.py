"""OLoRA: the factors are the first columns of the base weight's QR decomposition (https://arxiv.org/abs/2406.01775)."""

from __future__ import annotations

import torch

from lorica.init.base import Factors, InitRequest, register
from lorica.init.pissa import weight_of, zero_bias
from lorica.init.random import start_embedding


@register("olora", subtracts=True)
def olora(request: InitRequest) -> Factors:
    """``B`` holds the first ``r`` orthonormal columns of ``W = Q·R``, ``A`` the first rows of ``R``.

    The base weight keeps ``W - s·B·A``. The first columns of Q depend on the first columns of W alone, so that only
    those are decomposed: ``B = qr(W[:, :r]).Q`` and ``A = Bᵀ·W``. Embeddings start as by default and keep their weight.

    Raises:
        ConfigError: the target is a convolution, or the rank is larger than a side of the weight.
    """
    if request.lookup:
        return start_embedding(request)
    weight = weight_of(request)
    b_OR = torch.linalg.qr(weight[..., : request.r]).Q
    return Factors(b_OR.mT @ weight, b_OR, zero_bias(request))
