"""The libraries that cut models, each recognised and described as layouts."""

from lorica.engines.describe import Engines
from lorica.engines.site import Axis, Site

__all__ = ["Axis", "Engines", "Site"]
