"""Experts that are modules, which ranks may have different ones of."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from lorica.engines.registry import described
from lorica.engines.stages import EXPERTS
from lorica.errors import TargetError
from lorica.targets.match import Meaning
from lorica.targets.walk import bare

_EXPERT = re.compile(r"(?P<before>.*\.)(?P<number>\d+)(?P<after>\.[^.]+)")


def is_routed_expert(module: nn.Module) -> bool:
    """Whether a base layer is one of an expert's that tokens are routed to, as a module of its own."""
    place = described(module)
    return place is not None and EXPERTS in place.axes


def check_experts_alike(
    modules: Mapping[str, nn.Module], fused: Mapping[str, Collection[str]], is_meant: Meaning
) -> None:
    """Refuse targets in some experts of a block only, where other ranks have other experts of it.

    Each rank sends the gradients of its tokens to the experts that they went to; a rank without anything that trains
    would send none, and the others wait for it.

    Args:
        modules: what is walked, by logical names.
        fused: names of the projections that are fused in modules, by the names of these.
        is_meant: whether a name is a target.

    Raises:
        TargetError: names two experts.
    """
    blocks: dict[tuple[str, str], list[re.Match[str]]] = {}
    ranks: dict[tuple[str, str], int] = {}
    for key, module in modules.items():
        found = _EXPERT.fullmatch(key)
        place = None if found is None else described(bare(module))
        if found is not None and place is not None and EXPERTS in place.axes:
            block = found["before"], found["after"]
            blocks.setdefault(block, []).append(found)
            ranks[block] = place.axes[EXPERTS].size
    for block, here in blocks.items():
        if ranks[block] > 1:
            first = here[0]
            _check(first, len(here) * ranks[block], (first[0], *fused.get(first[0], ())), is_meant)


def _check(found: re.Match[str], count: int, names: Collection[str], is_meant: Meaning) -> None:
    for name in names:
        after = name[found.end("number") :]
        meant = [is_meant(f"{found['before']}{number}{after}") for number in range(count)]
        if any(meant) and not all(meant):
            raise TargetError(
                f"{found['before']}{meant.index(True)}{after} is a target and {found['before']}{meant.index(False)}"
                f"{after} is none, but experts are divided over ranks: a rank on which nothing trains would not send "
                "its tokens' gradients. Target all experts of a block, or none of them"
            )
