"""Which implementation of an op is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

Run = Callable[..., Any]
Fits = Callable[..., bool]


class Kernel(NamedTuple):
    """One implementation of an op.

    Attributes:
        name: what :func:`using` takes.
        run: the implementation; all of an op take the same arguments and return the same to rounding.
        fits: asked with the op's arguments whether it can be used for them now.
    """

    name: str
    run: Run
    fits: Fits


def _always(*args: Any) -> bool:
    return True


#: Op → its implementations, in the order in which they are tried; the last one fits everything.
KERNELS: dict[str, list[Kernel]] = {}

_wanted: ContextVar[str | None] = ContextVar("wanted", default=None)


def asked() -> str | None:
    """Return the implementation that :func:`using` asks for, or None."""
    return _wanted.get()


def register(op: str, name: str, run: Run, fits: Fits = _always) -> None:
    """Enter an implementation, behind those that are there."""
    KERNELS.setdefault(op, []).append(Kernel(name, run, fits))


def kernel_for(op: str, *args: Any) -> Run:
    """Return the first implementation of an op that fits its arguments."""
    wanted = _wanted.get()
    kernels = KERNELS[op]
    for kernel in kernels:
        if (wanted is None or kernel.name == wanted) and kernel.fits(*args):
            return kernel.run
    return kernels[-1].run


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use one implementation, wherever it fits, inside a ``with`` block.

    ``using("plain")`` is the oracle of all. It also draws dropout masks by torch's own dropout, from the default
    generator, as PEFT does; the others draw one seed from it for each mask.

    Raises:
        ValueError: no op has an implementation of that name.
    """
    known = sorted({kernel.name for kernels in KERNELS.values() for kernel in kernels})
    if name not in known:
        raise ValueError(f"there is no implementation {name!r}; there are {', '.join(known)}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)
