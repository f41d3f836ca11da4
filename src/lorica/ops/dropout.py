"""Dropout whose masks agree wherever ranks hold the same values.

On one process it is torch's. On a layer that is cut, every mask comes from a generator of its own, seeded by one draw
from torch's default generator (so that activation checkpointing draws it again) and mixed with this rank's coordinates
on those axes over which the values are divided. Ranks that hold the same values draw the same mask, as long as their
default generators are in step: each layer draws once, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.engines.site import Site
from lorica.kernels.dropout import MIX, draw_seed


def drop(
    x: Tensor,
    spec: AdapterSpec,
    position: str,
    site: Site | None,
    training: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Apply the adapter's dropout to ``x`` if it belongs at ``position``.

    Args:
        x: ``[…, in]`` at ``"pre"``, ``[…, out]`` at ``"post"``.
        spec: probability and position.
        position: where in the adapter this is.
        site: where the layer lies.
        training: whether dropout is on.
        generator: from :func:`generator_for`, where a layer drops more than once in a forward.
    """
    if not (spec.dropout and training and spec.dropout_position == position):
        return x
    if site is None:
        return F.dropout(x, spec.dropout)
    generator = generator or generator_for(x.device, spec, site)
    keep = torch.empty_like(x).bernoulli_(1 - spec.dropout, generator=generator)
    return x * keep.div_(1 - spec.dropout) if spec.dropout < 1 else x * keep


def generator_for(device: torch.device, spec: AdapterSpec, site: Site) -> torch.Generator:
    """Return the generator of an adapter's masks in one forward of a layer that is cut, for one draw from the default.

    A layer that drops a number of times that depends on this rank's tokens asks for it once, so that the default
    generators stay in step.
    """
    return torch.Generator(device).manual_seed(_seed(site, "in" if spec.dropout_position == "pre" else "out"))


def _seed(site: Site, role: str) -> int:
    return mixed(draw_seed(), site, (role, "expert"), site.layout.sequence)


def mixed(seed: int, site: Site | None, roles: Iterable[str], tokens: Iterable[str] = ()) -> int:
    """Return a seed of their own for ranks that hold different values: of batches, of dimensions, of tokens.

    Args:
        seed: the same on all ranks of a batch.
        site: where the layer lies.
        roles: of the dimensions that values have; ranks among which one of them is divided draw apart.
        tokens: axes that divide the tokens of a batch, where values go by token.
    """
    if site is None:
        return seed
    cuts = [cut.axis for dim in roles if (cut := site.layout.cut_of(dim)) is not None]
    place = 0
    for name in dict.fromkeys([*cuts, *tokens, *site.layout.data, *site.apart]):
        axis = site.axes[name]
        place = place * axis.size + axis.rank
    return (seed + place * MIX) % 2**63
