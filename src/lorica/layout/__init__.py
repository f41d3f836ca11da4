"""How one logical weight lies over ranks: pure data and pure functions, without a process group or a device."""

from lorica.layout.cuts import Cut, Held, even, fused, held_by_slots
from lorica.layout.heads import HeadOrder, grouped_heads
from lorica.layout.layout import Box, Layout, Roles

__all__ = ["Box", "Cut", "HeadOrder", "Held", "Layout", "Roles", "even", "fused", "grouped_heads", "held_by_slots"]
