"""The frozen description of one adapter on one target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Everything about one adapter on one target that is not a tensor.

    Attributes:
        r: the rank.
        alpha: the numerator of the scale.
        scaling: ``s`` in ``ΔW = s·B·A``: ``alpha / r``, or ``alpha / √r`` with rank stabilisation.
        dropout: probability.
        dropout_position: ``"pre"`` on the way into A, ``"post"`` after B.
        rslora: whether the scale is rank-stabilised.
        bias: whether B has a bias.
        a2a: whether hidden values travel where the layer offers it.
        parts: of a layer that holds several projections, those that are adapted; empty: all.
        variant: the field of the configuration that turns its variant on (``"use_dora"``); empty: plain LoRA.
        options: what that field says beyond being on, such as a ``KasaConfig``.
        frozen: factors that do not train: ``"a"``, ``"b"``.
    """

    r: int
    alpha: float
    scaling: float
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    rslora: bool = False
    bias: bool = False
    variant: str = ""
    parts: tuple[str, ...] = ()
    a2a: bool = False
    options: Any = field(default=None, hash=False)
    frozen: tuple[str, ...] = ()

    @property
    def natural_scaling(self) -> float:
        """The scale that rank and alpha give, before anybody changed it."""
        return self.scale(self.r, self.alpha, rslora=self.rslora)

    @staticmethod
    def scale(r: int, alpha: float, *, rslora: bool) -> float:
        """Return ``alpha / r``, or ``alpha / √r``."""
        return alpha / math.sqrt(r) if rslora else alpha / r
