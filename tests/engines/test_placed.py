"""Layers of an engine's own are known by the names of their classes, and described once."""

from __future__ import annotations

import copy

from torch import nn

from lorica.engines.placed import Kinds, Placed, describe_anew, describe_whole, described_once
from lorica.engines.site import Axis
from lorica.layout import Layout, even


class Block(nn.Module):
    pass


class Special(Block):
    pass


BLOCK, SPECIAL = (f"{cls.__module__}.{cls.__qualname__}" for cls in (Block, Special))


def test_a_class_is_of_the_first_kind_among_it_and_its_bases():
    derived = type("Derived", (Special,), {})
    assert Kinds((SPECIAL, BLOCK)).of(derived) == SPECIAL
    assert Kinds((BLOCK, SPECIAL)).of(derived) == BLOCK
    assert Kinds((BLOCK, SPECIAL)).of(nn.Linear) is None


def test_a_layer_is_described_once_and_its_copy_and_what_was_told_anew():
    described = []

    def describe(module: nn.Module) -> Placed:
        described.append(module)
        return Placed(module, BLOCK, Layout({"out": 4}, (even("tp", "out", 4, 2),)), {"tp": Axis("tp", 2, 1, None)})

    layer = Block()
    found = described_once(layer, describe)
    assert described_once(layer, describe) is found
    assert found.at == {"tp": 1}
    other = copy.copy(layer)
    other.__dict__ = dict(layer.__dict__)
    assert described_once(other, describe).module is other
    describe_anew(layer)
    assert described_once(layer, describe) is not found
    assert described == [layer, other, layer]

    describe_whole(layer, found)
    whole = described_once(layer, describe)
    assert whole.module is layer
    assert whole.layout == Layout({"out": 4})
    assert len(described) == 3
