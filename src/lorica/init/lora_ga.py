"""LoRA-GA: the factors lie along the gradient of the base weight (https://arxiv.org/abs/2407.05000)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.init.base import Factors, InitRequest, register, target_generator
from lorica.init.corda import found_of
from lorica.init.pissa import zero_bias
from lorica.init.random import start_embedding
from lorica.lowrank import exact_svd, sketched_svd

#: Weights with a shorter side than this are decomposed exactly.
EXACT_UP_TO = 512


@register("lora_ga", subtracts=True, needs="gradient", options="lora_ga_config")
def lora_ga(request: InitRequest) -> Factors:
    """A and B are singular vectors of the gradient; ``s·B·A`` is taken out of the base weight.

    Of the first ``2r`` singular triples ``(u, σ, v)`` of the gradient, A gets vectors v and B vectors ``σ·u``; which,
    ``direction`` says, and how large B is in the end, ``scale``. Embeddings start as by default and keep their weight.

    Raises:
        ConfigError: nothing was found out about the target, or for another rank.
    """
    if request.lookup:
        return start_embedding(request)
    found = found_of(request, "preprocess_loraga(model, config, train_step)")
    r, options = request.r, request.options
    if options is None:
        raise ConfigError("init_lora_weights='lora_ga' needs lora_ga_config=LoraGAConfig(...)")
    u, s, v = found["u"], found["s"], found["v"]
    shapes = ((len(s), request.shape_a[-1]), (request.shape_b[0], len(s)))
    if len(s) != 2 * r or (tuple(v.shape), tuple(u.shape)) != shapes:
        raise ConfigError(
            f"{request.target}: preprocess_loraga kept {len(s)} directions of a gradient {u.shape[0]} × {v.shape[1]}; "
            f"r={r} needs {2 * r} of {request.shape_b[0]} × {request.shape_a[-1]}; call it with the same model and "
            "configuration"
        )
    for_a, for_b = _chosen(options.direction, r, request.target)
    a, b, s_b = v[for_a], u[:, for_b] * s[for_b], s[for_b]
    a, b = _scaled(a, b, s_b, request)
    return Factors(a.float(), b.float(), zero_bias(request))


def _chosen(direction: str, r: int, target: str) -> tuple[Tensor, Tensor]:
    """Return which of the ``2r`` triples A and B take; by chance, but always the same ones for a target's name, since
    loading a file starts anew."""
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    if direction == "ArBr":
        return torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
    if direction == "random":
        drawn = torch.randperm(2 * r, generator=target_generator(0, target))[:r]
        return drawn, drawn
    return (second, first) if direction == "A2rBr" else (first, second)


def _scaled(a: Tensor, b: Tensor, s_b: Tensor, request: InitRequest) -> tuple[Tensor, Tensor]:
    options: Any = request.options
    if options.scale == "stable":
        return a, b * (request.shape_b[0] ** 0.25 / options.stable_gamma**0.5)
    if options.scale == "weight_svd":
        return a, b * (_largest(request).to(s_b) / s_b[0]) if s_b[0] > 0 else b
    if options.scale == "gd_scale":
        return a / request.scaling, b / request.scaling
    return a, b


def _largest(request: InitRequest) -> Tensor:
    """Return the largest singular value of the base weight."""
    weight = request.weight().float()
    if min(weight.shape) <= EXACT_UP_TO:
        return exact_svd(weight).s[0]
    return sketched_svd(weight, 1, target_generator(0, request.target)).s[0]
