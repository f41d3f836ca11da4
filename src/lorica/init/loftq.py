"""LoftQ: the base weight is quantised and the factors start as what that loses (https://arxiv.org/abs/2310.08659).

The quantisers give what bitsandbytes gives (https://github.com/bitsandbytes-foundation/bitsandbytes): NF4 in blocks of
64 numbers (https://arxiv.org/abs/2305.14314, appendix E) and int8 by rows of half-precision numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.init.base import Factors, InitRequest, register
from lorica.init.pissa import weight_of, zero_bias
from lorica.init.random import start_embedding
from lorica.lowrank import Svd, cut, exact_svd

#: Numbers that share one scale.
NF4_BLOCK = 64
#: The values of NF4: quantiles of the normal distribution, scaled into [-1, 1], with an exact zero.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4(weight: Tensor) -> Tensor:
    """Return a weight of any shape as NF4 keeps it, in float32."""
    values = torch.tensor(NF4_VALUES, device=weight.device)
    flat = weight.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    unit = (blocks * (1.0 / scale.clamp(min=1e-38))).clamp(-1, 1)
    nearest = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
    return (values[nearest] * scale).flatten()[: len(flat)].view(weight.shape)


def int8(weight: Tensor) -> Tensor:
    """Return a weight ``[out, in]`` as int8 keeps it, in float32: a row of zeros stays one."""
    half = weight.half()
    scale = half.abs().amax(-1, keepdim=True).float()
    units = torch.round(half * (127.0 / scale.clamp(min=1e-38))).to(torch.int8)
    return units.float() * scale / 127.0


_QUANTISERS = {4: nf4, 8: int8}


def _options(request: InitRequest) -> tuple[Any, int]:
    """Return the quantiser and how often it is applied."""
    given = request.options or {}
    bits, rounds = given.get("loftq_bits", 4), given.get("loftq_iter", 1)
    if bits not in _QUANTISERS:
        raise ConfigError(f"{request.target}: loftq_bits={bits!r}: LoftQ quantises to 4 bits (NF4) or 8 (int8)")
    if not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"{request.target}: loftq_iter={rounds!r}: a number of rounds is at least 1")
    return _QUANTISERS[bits], rounds


def leading(lost: Tensor, r: int) -> Svd:
    """Return the first ``r`` singular triples of what quantisation lost."""
    return cut(exact_svd(lost), r)


def _quantised(request: InitRequest, weight: Tensor) -> Tensor:
    """Return the quantised weight of the last round."""
    quantise, rounds = _options(request)
    kept: Tensor = quantise(weight)
    for _ in range(rounds - 1):
        u, s, v = leading(weight - kept, request.r)
        kept = quantise(weight - (u * s) @ v)
    return kept


def _leaves(request: InitRequest) -> Tensor:
    """Return the base weight as it is kept: quantised, and back."""
    return _quantised(request, weight_of(request).float())


@register("loftq", subtracts=True, leaves=_leaves, options="loftq_config")
def loftq(request: InitRequest) -> Factors:
    """``s·B·A`` is nearest to ``W - Q``, and the base weight becomes ``Q``, the quantised weight.

    In every round but the first it is ``W - s·B·A`` of the round before that is quantised. Embeddings start as by
    default and keep their weight.

    Raises:
        ConfigError: the bits or the rounds are impossible, the target is no linear layer, the rank larger than a side
            of its weight, or the scale not positive.
    """
    if request.lookup:
        return start_embedding(request)
    if request.scaling <= 0:
        raise ConfigError(f"{request.target}: LoftQ needs a positive scale (lora_alpha), got {request.scaling}")
    weight = weight_of(request).float()
    u, s, v = leading(weight - _quantised(request, weight), request.r)
    root = (s / request.scaling).sqrt()
    return Factors(root.unsqueeze(-1) * v, u * root, zero_bias(request))
