"""How EVA shares ranks out anew: the directions that explain most, over all layers (https://arxiv.org/abs/2410.07170,
section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What a layer has to show for itself.

    Attributes:
        rank: what it has.
        most: what it can get.
        leader: name of the first layer with the same inputs.
        explained: the share of the variance of its inputs that each direction explains, falling.
        parts: how many projections are fused in it, each of which gets the same rank.
    """

    rank: int
    most: int
    leader: str
    explained: Sequence[float]
    parts: int = 1


def shared_out(claims: Mapping[str, Claim]) -> dict[str, int]:
    """Return the rank of each layer: together as many as they have, each direction to the layer that it explains most.

    Among layers that claim the same, the first in order comes first.
    """
    order = {name: place for place, name in enumerate(claims)}
    most = _most_of_groups(claims)
    wanted = [
        (-value, order[name], name)
        for name, claim in claims.items()
        for value in [*claims[claim.leader].explained][: most[claim.leader]]
    ]
    left = sum(claim.rank * claim.parts for claim in claims.values())
    ranks = dict.fromkeys(claims, 0)
    for _, _, name in sorted(wanted, key=lambda item: item[:2]):
        if claims[name].parts <= left:
            ranks[name] += 1
            left -= claims[name].parts
    return ranks


def _most_of_groups(claims: Mapping[str, Claim]) -> dict[str, int]:
    """Return how much each layer of a group with the same inputs can get: what the largest of them can."""
    most: dict[str, int] = {}
    for claim in claims.values():
        most[claim.leader] = max(most.get(claim.leader, 0), claim.most)
    return most


__all__ = ["Claim", "shared_out"]
