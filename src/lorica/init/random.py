"""Factors that start at random, or as zero: no look at the base weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError
from lorica.init.base import PAIRS, Factors, Init, Initialisation, InitRequest, register


def _zero_b(request: InitRequest, a: Tensor) -> Factors:
    bias = torch.zeros(request.shape_b[0]) if request.bias else None
    return Factors(a, torch.zeros(request.shape_b), bias)


def start_embedding(request: InitRequest) -> Factors:
    """Start an embedding the other way round: A zero, B standard normal, as ``nn.Embedding`` draws its rows."""
    b = torch.empty(request.shape_b).normal_(generator=request.generator)
    return Factors(torch.zeros(request.shape_a), b)


def _a_then_zero(draw: Callable[[Tensor, InitRequest], object]) -> Init:
    def init(request: InitRequest) -> Factors:
        if request.lookup:
            return start_embedding(request)
        a = torch.empty(request.shape_a)
        draw(a, request)
        return _zero_b(request, a)

    return init


def _kaiming(tensor: Tensor, generator: torch.Generator) -> None:
    # nn.init.kaiming_uniform_(tensor, a=√5) to the last bit, without its checks: they take twice as long as the draw.
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    fan = max(1, math.prod(tensor.shape[1:]))
    bound = math.sqrt(3.0) * (gain / math.sqrt(fan))
    tensor.uniform_(-bound, bound, generator=generator)


# The reference initialisation of LoRA; https://github.com/microsoft/LoRA, loralib/layers.py.
register("kaiming")(register(True)(_a_then_zero(lambda a, request: _kaiming(a, request.generator))))
# Standard deviation 1/r, as diffusers and PEFT have it.
register("gaussian")(_a_then_zero(lambda a, request: a.normal_(std=1 / request.r, generator=request.generator)))


#: Megatron Bridge's choices for each factor.
METHODS: dict[str, Callable[[Tensor, torch.Generator], object]] = {
    "xavier": lambda tensor, generator: nn.init.xavier_normal_(tensor, generator=generator),
    "kaiming": _kaiming,
    "normal": lambda tensor, generator: tensor.normal_(std=0.2, generator=generator),
    "zero": lambda tensor, generator: tensor.zero_(),
}


def _a_and_b(for_a: str, for_b: str) -> Init:
    def init(request: InitRequest) -> Factors:
        if request.lookup:
            return start_embedding(request)
        a, b = torch.empty(request.shape_a), torch.empty(request.shape_b)
        METHODS[for_a](a, request.generator)
        METHODS[for_b](b, request.generator)
        return Factors(a, b, torch.zeros(request.shape_b[0]) if request.bias else None)

    return init


def named_after(for_a: str, for_b: str) -> str:
    """Return the name of the initialisation that draws A and B by these of :data:`METHODS`."""
    return for_a if for_b == "zero" else f"{for_a}+{for_b}"


for _a in ("xavier", "normal"):
    register(_a)(_a_and_b(_a, "zero"))
# With both zero no gradient is anything else, so that pair is none.
PAIRS.update(
    {named_after(a, b): Initialisation(_a_and_b(a, b)) for a in METHODS for b in METHODS if b != "zero"},
)


@register(False)
def random_both(request: InitRequest) -> Factors:
    """Both factors random, as a fresh layer of torch would start: the model changes at once."""
    generator = request.generator
    a, b = torch.empty(request.shape_a), torch.empty(request.shape_b)
    if request.lookup:
        return Factors(a.normal_(generator=generator), b.normal_(generator=generator))
    _kaiming(a, generator)
    _kaiming(b, generator)
    if not request.bias:
        return Factors(a, b)
    bound = 1 / math.sqrt(b[0].numel())
    return Factors(a, b, torch.empty(b.shape[0]).uniform_(-bound, bound, generator=generator))


@register("orthogonal")
def orthogonal(request: InitRequest) -> Factors:
    """A and B from the even and odd rows of one orthogonal matrix, so that ``B·A`` is zero and neither factor is.

    Source: https://datta0.github.io/posts/rethink-lora-init/

    Raises:
        ConfigError: the rank is odd, or the target is not a linear layer.
    """
    r, generator = request.r, request.generator
    if r % 2 or len(request.shape_a) != 2 or request.lookup:
        raise ConfigError(
            f"{request.target}: Orthogonal initialization requires the LoRA rank to be even and a linear layer, "
            f"got rank {r} and A of shape {tuple(request.shape_a)}"
        )
    q_RR = torch.linalg.qr(torch.empty(r, r).normal_(generator=generator)).Q
    mix_IH = torch.empty(request.shape_a[1], r // 2).normal_(generator=generator)
    mix_OH = torch.empty(request.shape_b[0], r // 2).normal_(generator=generator)
    bias = torch.zeros(request.shape_b[0]) if request.bias else None
    # Rows of Q are orthonormal, hence q_odd · q_evenᵀ = 0 and with it B·A = mix · (q_even · q_oddᵀ) · mixᵀ = 0.
    return Factors((mix_IH @ q_RR[0::2]).T.contiguous() / 10, (mix_OH @ q_RR[1::2]).contiguous() / 10, bias)
