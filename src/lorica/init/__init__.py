"""How the factors start: a registry of pure functions from a request to the logical factors.

A new initialisation is one function and one ``@register`` line. It sees the logical shapes and draws from a generator
of the target's own, so that its result does not depend on where the weight lies or what else is adapted.
"""

from __future__ import annotations

from lorica.init import corda, eva, loftq, lora_ga, mica, olora, pissa, random
from lorica.init.base import (
    INITS,
    Factors,
    Init,
    InitRequest,
    find,
    freezes,
    initialise,
    leftover,
    made_by,
    reads_weight,
    register,
    subtracts,
    target_generator,
)

__all__ = [
    "INITS",
    "Factors",
    "Init",
    "InitRequest",
    "corda",
    "eva",
    "find",
    "freezes",
    "initialise",
    "leftover",
    "loftq",
    "lora_ga",
    "made_by",
    "mica",
    "olora",
    "pissa",
    "random",
    "reads_weight",
    "register",
    "subtracts",
    "target_generator",
]
