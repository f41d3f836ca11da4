"""How the factors start: a registry of pure functions from a request to the logical factors.

A new initialisation is one function and one ``@register`` line. It sees the logical shapes and draws from a generator
of the target's own, so that its result does not depend on where the weight lies or what else is adapted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError


class Factors(NamedTuple):
    """The low-rank factors of one target.

    For a linear of ``[out, in]``: ``a_RI`` is ``[r, in]``, ``b_OR`` is ``[out, r]`` and ``bias_O``, if any, ``[out]``.
    For an embedding of ``V`` rows of width ``d``: ``[r, V]`` and ``[d, r]``. For a convolution: its kernel, ``[r, in,
    *k]``, and a pointwise ``[out, r, 1 …]``.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class InitRequest:
    """What an initialisation may look at.

    Attributes:
        target: full name of the module, for messages.
        r: the rank.
        scaling: ``s`` in ``ΔW = s·B·A``.
        shape_a: logical shape of A.
        shape_b: logical shape of B.
        bias: whether B has a bias.
        lookup: whether A is looked up by index (an embedding) rather than multiplied.
        generator: source of every random number, on the CPU.
        weight: gives the logical base weight ``[out, in]`` in its own dtype.
    """

    target: str
    r: int
    scaling: float
    shape_a: torch.Size
    shape_b: torch.Size
    bias: bool
    lookup: bool
    generator: torch.Generator
    weight: Callable[[], Tensor]


Init = Callable[[InitRequest], Factors]
INITS: dict[bool | str, Init] = {}


def register(name: bool | str) -> Callable[[Init], Init]:
    """Make an initialisation known under ``name`` to ``LoraConfig.init_lora_weights``."""

    def add(function: Init) -> Init:
        INITS[name] = function
        return function

    return add


def initialise(name: bool | str, request: InitRequest) -> Factors:
    """Return the logical factors that the initialisation ``name`` gives, in float32 on the CPU."""
    return INITS[name.lower() if isinstance(name, str) else name](request)


def draw_seed() -> int:
    """Take one draw from torch's default generator, so that ``torch.manual_seed`` governs what follows."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64))


def target_generator(seed: int, target: str) -> torch.Generator:
    """Return a CPU generator for one target: ``seed`` mixed with the target's name."""
    digest = hashlib.blake2b(target.encode(), key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def _zero_b(request: InitRequest, a: Tensor) -> Factors:
    bias = torch.zeros(request.shape_b[0]) if request.bias else None
    return Factors(a, torch.zeros(request.shape_b), bias)


def _lookup(request: InitRequest) -> Factors:
    # An embedding starts the other way round: A zero, B standard normal, as nn.Embedding draws its rows.
    b = torch.empty(request.shape_b).normal_(generator=request.generator)
    return Factors(torch.zeros(request.shape_a), b)


def _a_then_zero(draw: Callable[[Tensor, InitRequest], object]) -> Init:
    def init(request: InitRequest) -> Factors:
        if request.lookup:
            return _lookup(request)
        a = torch.empty(request.shape_a)
        draw(a, request)
        return _zero_b(request, a)

    return init


def _kaiming(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


# The reference initialisation of LoRA; https://github.com/microsoft/LoRA, loralib/layers.py.
register(True)(_a_then_zero(lambda a, request: _kaiming(a, request.generator)))
register("kaiming")(INITS[True])
# Standard deviation 1/r, as diffusers and PEFT have it.
register("gaussian")(_a_then_zero(lambda a, request: a.normal_(std=1 / request.r, generator=request.generator)))
# The two further choices of Megatron Bridge's lora_A_init_method.
register("xavier")(_a_then_zero(lambda a, request: nn.init.xavier_normal_(a, generator=request.generator)))
register("normal")(_a_then_zero(lambda a, request: a.normal_(std=0.2, generator=request.generator)))


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
