"""How the factors of fused projections start: each as if it stood alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorica.config import AdapterSpec, LoraConfig
from lorica.init import Factors, InitRequest, initialise, target_generator


def each_part(
    config: LoraConfig, whole: InitRequest, parts: list[tuple[str, int, int]], spec: AdapterSpec, seed: int
) -> Factors:
    """Return the factors of projections fused in one weight.

    Each starts as it would alone. Those that are not adapted are zero and stay so, since the gradients of a pair of
    zeros are zero.

    Args:
        config: says how they start.
        whole: the request for the fused weight.
        parts: name, first row and last row of each projection.
        spec: which of them are adapted.
        seed: of the adapter.
    """
    weight = functools.cache(whole.weight)
    found = []
    for name, first, last in parts:
        target = ".".join([*whole.target.split(".")[:-1], name])
        request = replace(
            whole,
            target=target,
            shape_a=torch.Size((spec.r, whole.shape_a[1])),
            shape_b=torch.Size((last - first, spec.r)),
            generator=target_generator(seed, target),
            weight=partial(_rows, weight, first, last),
        )
        made = initialise(config.init_lora_weights, request)
        adapted = not spec.parts or name in spec.parts
        found.append(made if adapted else _zero(made))
    bias = None if found[0].bias is None else torch.cat([made.bias for made in found if made.bias is not None])
    return Factors(torch.cat([made.a for made in found]), torch.cat([made.b for made in found]), bias)


def _rows(weight: Callable[[], Tensor], first: int, last: int) -> Tensor:
    return weight()[first:last]


def _zero(made: Factors) -> Factors:
    bias = None if made.bias is None else torch.zeros_like(made.bias)
    return Factors(torch.zeros_like(made.a), torch.zeros_like(made.b), bias)
