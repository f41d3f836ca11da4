"""CorDA: the factors are a decomposition of the base weight along its inputs (https://arxiv.org/abs/2406.05223)."""

from __future__ import annotations

import torch

from lorica.errors import ConfigError
from lorica.init.base import Factors, InitRequest, register
from lorica.init.pissa import zero_bias
from lorica.init.random import start_embedding


@register("corda", subtracts=True, needs="covariance", options="corda_config")
def corda(request: InitRequest) -> Factors:
    """``s·B·A`` is the part ``U·S·Vᵀ`` of the base weight that the covariance of its inputs names; the rest stays.

    With ``U·S·Wᵀ = svd(W·C)`` and ``V = C⁻¹·W``, ``A = √(S/s)·Vᵀ`` and ``B = U·√(S/s)`` of the largest values (``ipm``)
    or the smallest (``kpm``). Embeddings start as by default and keep their weight.

    Raises:
        ConfigError: nothing was found out about the target, or for another rank; or the scale is not positive.
    """
    if request.lookup:
        return start_embedding(request)
    found = found_of(request, "preprocess_corda(model, config, run_model)")
    if request.scaling <= 0:
        raise ConfigError(f"{request.target}: CorDA needs a positive scale (lora_alpha), got {request.scaling}")
    u_OR, s_R, v_RI = found["u"], found["s"], found["v"]
    shapes = (torch.Size(v_RI.shape), torch.Size(u_OR.shape))
    if shapes != (request.shape_a, request.shape_b):
        raise ConfigError(
            f"{request.target}: preprocess_corda decomposed it for factors of the shapes {tuple(shapes[0])} and "
            f"{tuple(shapes[1])}, wanted are {tuple(request.shape_a)} and {tuple(request.shape_b)}; call it with the "
            "same model and configuration (a cache_file holds one rank)"
        )
    root = (s_R / request.scaling).sqrt()
    return Factors(root.unsqueeze(-1) * v_RI, u_OR * root, zero_bias(request))


def found_of(request: InitRequest, call: str) -> dict[str, torch.Tensor]:
    """Return what calibration found out about a target.

    Args:
        request: for the target.
        call: what finds it out, for the message.

    Raises:
        ConfigError: it was not asked for, or this kind of layer cannot be looked at.
    """
    if not request.found:
        raise ConfigError(
            f"{request.target}: this initialisation starts from data, of which nothing is known here. Call "
            f"lorica.{call} on the same base model first; linear layers can start so, others are to be left out of "
            "target_modules. A saved adapter that started so changed its base weights: load it after the same call, or "
            "with config=LoraConfig(..., init_lora_weights=True) into a model saved with the change"
        )
    return dict(request.found)
