"""What calibration found out about a base layer, kept on it until an adapter starts from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: Name of the projection inside a fused weight, empty where none is fused → names → logical tensors.
Found = Mapping[str, Mapping[str, Tensor]]

_PLACE = "_lorica_found"


def keep(base: nn.Module, parameter: str, statistic: str, found: Found) -> None:
    """Keep what was found out about one parameter of a base layer.

    Args:
        base: the base layer.
        parameter: name of its weight.
        statistic: what it is, as an initialisation names what it needs.
        found: the tensors. They are logical ones, whatever part of the weight is here.
    """
    base.__dict__.setdefault(_PLACE, {})[parameter, statistic] = found


def kept(base: nn.Module, parameter: str, statistic: str) -> Found:
    """Return what :func:`keep` kept; empty where it is nothing."""
    places: dict[Any, Found] = base.__dict__.get(_PLACE, {})
    return places.get((parameter, statistic), {})


def forget(base: nn.Module, parameter: str, statistic: str) -> None:
    """Forget it; what is not there is no error."""
    places = base.__dict__.get(_PLACE, {})
    places.pop((parameter, statistic), None)
    if not places:
        base.__dict__.pop(_PLACE, None)
