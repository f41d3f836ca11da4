"""Adapters on models that are cut over ranks: layouts, native layers, gradients, agreement of ranks."""

from lorica.engines.site import Axis, Site
from lorica.layout import Cut, HeadOrder, Layout, grouped_heads

__all__ = ["Axis", "Cut", "HeadOrder", "Layout", "Site", "grouped_heads"]
