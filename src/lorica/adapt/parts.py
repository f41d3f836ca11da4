"""How the factors of fused projections start: each as if it stood alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorica.config import AdapterSpec, LoraConfig
from lorica.init import Factors, Init, InitRequest, initialise, leftover, target_generator
from lorica.init.statistics import Found

#: Name, first row and last row (exclusive) of each projection in a fused weight.
Parts = list[tuple[str, int, int]]


def each_part(
    config: LoraConfig,
    whole: InitRequest,
    parts: list[tuple[str, int, int]],
    spec: AdapterSpec,
    seed: int,
    found: Found,
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
        found: what calibration found out about each.
    """
    made = []
    for name, request in _requests(whole, parts, spec, seed, found):
        adapted = not spec.parts or name in spec.parts
        made.append(initialise(config.init_lora_weights if adapted else True, request))
        made[-1] = made[-1] if adapted else _zero(made[-1])
    bias = None if made[0].bias is None else torch.cat([one.bias for one in made if one.bias is not None])
    return Factors(torch.cat([one.a for one in made]), torch.cat([one.b for one in made]), bias)


def left_of_parts(config: LoraConfig, whole: InitRequest, parts: Parts, spec: AdapterSpec) -> Tensor | None:
    """Return what an initialisation leaves of a fused weight, ``[out, in]``; None: the weight without the delta.

    Projections that are not adapted keep their rows.
    """
    rows = []
    for name, request in _requests(whole, parts, spec, 0, {}):
        adapted = not spec.parts or name in spec.parts
        left = leftover(config.init_lora_weights, request) if adapted else request.weight()
        if left is None:
            return None
        rows.append(left)
    return torch.cat(rows)


def taken_of_parts(take: Init, whole: InitRequest, parts: Parts, spec: AdapterSpec) -> Factors:
    """Return what a variant takes out of projections fused in one weight: out of each what it would take out of it
    alone, and nothing out of those that are not adapted."""
    made = [
        take(request) if not spec.parts or name in spec.parts else _nothing(request)
        for name, request in _requests(whole, parts, spec, 0, {})
    ]
    return Factors(torch.cat([one.a for one in made]), torch.cat([one.b for one in made]))


def _requests(
    whole: InitRequest, parts: Parts, spec: AdapterSpec, seed: int, found: Found
) -> Iterator[tuple[str, InitRequest]]:
    """Yield the name of every projection and the request for it alone."""
    weight = functools.cache(whole.weight)
    for name, first, last in parts:
        target = ".".join([*whole.target.split(".")[:-1], name])
        yield (
            name,
            replace(
                whole,
                target=target,
                shape_a=torch.Size((spec.r, whole.shape_a[1])),
                shape_b=torch.Size((last - first, whole.shape_b[1])),
                generator=target_generator(seed, target),
                weight=partial(_rows, weight, first, last),
                found=found.get(name, {}),
            ),
        )


def _rows(weight: Callable[[], Tensor], first: int, last: int) -> Tensor:
    return weight()[first:last]


def _nothing(request: InitRequest) -> Factors:
    device = request.weight().device
    return Factors(torch.zeros(request.shape_a, device=device), torch.zeros(request.shape_b, device=device))


def _zero(made: Factors) -> Factors:
    bias = None if made.bias is None else torch.zeros_like(made.bias)
    return Factors(torch.zeros_like(made.a), torch.zeros_like(made.b), bias)
