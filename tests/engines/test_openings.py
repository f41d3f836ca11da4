"""Openings that were put around one another can be closed in any order."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from lorica.engines.site import Opening


@pytest.mark.parametrize("own", [False, True], ids=["class's forward", "engine's forward"])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_what_stays_open_still_runs(order, own):
    module = nn.Identity()
    if own:
        module.forward = lambda x: x  # as an engine replaces it
    openings = [Opening(module, "forward") for _ in range(3)]
    for number, opening in enumerate(openings):
        opening.put(lambda x, number=number, opening=opening: f"{number}({opening.original(x)})")
    assert module("x") == "2(1(0(x)))"
    left = [2, 1, 0]
    for number in order:
        openings[number].close()
        openings[number].close()  # a second time changes nothing
        left.remove(number)
        expected = "".join(f"{n}(" for n in left) + "x" + ")" * len(left)
        assert module("x") == expected
    assert ("forward" in vars(module)) == own
