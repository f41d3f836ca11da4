"""What an initialisation is asked, what it gives, and the registry that finds it by name."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NO_EXTRAS: Mapping[str, Tensor] = {}


class Factors(NamedTuple):
    """The low-rank factors of one target.

    For a linear of ``[out, in]``: ``a_RI`` is ``[r, in]``, ``b_OR`` is ``[out, r]`` and ``bias_O``, if any, ``[out]``.
    For an embedding of ``V`` rows of width ``d``: ``[r, V]`` and ``[d, r]``. For a convolution: its kernel, ``[r, in,
    *k]``, and a pointwise ``[out, r, 1 …]``. For ``E`` experts with a pair each: ``[E, r, in]`` and ``[E, out, r]``.
    Some variants have tensors besides: ``extras``, by their names in a file.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    extras: Mapping[str, Tensor] = _NO_EXTRAS

    def tensors(self) -> list[Tensor]:
        """Return all tensors that there are: A, B, the bias, the extras."""
        return [self.a, self.b, *(() if self.bias is None else (self.bias,)), *self.extras.values()]

    def renewed(self, tensors: Iterable[Tensor]) -> Factors:
        """Return the same with other tensors, given in the order of :meth:`tensors`."""
        a, b, *rest = tensors
        bias = None if self.bias is None else rest.pop(0)
        return Factors(a, b, bias, dict(zip(self.extras, rest, strict=True)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Return the same with ``function`` applied to every tensor."""
        if self.bias is None and not self.extras:
            return Factors(function(self.a), function(self.b))
        return self.renewed(map(function, self.tensors()))


@dataclass(frozen=True)
class InitRequest:
    """What an initialisation may look at.

    Attributes:
        target: full name of the module, for messages.
        r: the rank.
        scaling: ``s`` in ``ΔW = s·B·A``.
        shape_a: logical shape of A.
        shape_b: logical shape of B.
        bias: whether B has a bias.
        lookup: whether A is looked up by index (an embedding) rather than multiplied.
        generator: source of every random number, on the CPU.
        weight: gives the logical base weight ``[out, in]`` in its own dtype, and on
            its device.
        number: the number at the end of the initialisation's name, where it has one.
        experts: how many experts get a pair each; the shapes and the weight then begin with that size.
        options: the field of the configuration that has the initialisation's name, where there is one.
        found: what calibration found out about the target: the statistic that the initialisation needs.
    """

    target: str
    r: int
    scaling: float
    shape_a: torch.Size
    shape_b: torch.Size
    bias: bool
    lookup: bool
    generator: torch.Generator
    weight: Callable[[], Tensor]
    number: int = 0
    experts: int = 0
    options: Any = None
    found: Mapping[str, Tensor] = field(default_factory=dict)


Init = Callable[[InitRequest], Factors]


class Initialisation(NamedTuple):
    """One initialisation.

    Attributes:
        function: makes the logical factors.
        subtracts: whether the delta they make is taken out of the base weight, so that the model starts as it was.
            Loading an adapter that started so takes it out again (PEFT's meaning of such files).
        leaves: where the base weight is not left as ``W - s·B·A``: makes what is left of it, ``[out, in]``.
        needs: the statistic of :mod:`lorica.init.statistics` that it starts from; empty: it needs no data.
        options: the field of ``LoraConfig`` with its options; empty: it has none.
        freezes: the factors that stay as they start: ``"a"``, ``"b"``.
        reads_weight: whether it looks at the base weight though it leaves it as it is.
    """

    function: Init
    subtracts: bool = False
    leaves: Callable[[InitRequest], Tensor] | None = None
    needs: str = ""
    options: str = ""
    freezes: tuple[str, ...] = ()
    reads_weight: bool = False


#: Name → initialisation. A name that ends in ``_N`` stands for every number in that place.
INITS: dict[bool | str, Initialisation] = {}
#: The same for pairs of names: how A starts, and how B does (``"xavier+normal"``).
PAIRS: dict[bool | str, Initialisation] = {}


def register(
    name: bool | str,
    *,
    subtracts: bool = False,
    leaves: Callable[[InitRequest], Tensor] | None = None,
    needs: str = "",
    options: str = "",
    freezes: tuple[str, ...] = (),
    reads_weight: bool = False,
) -> Callable[[Init], Init]:
    """Make an initialisation known under ``name`` to ``LoraConfig.init_lora_weights``; see :class:`Initialisation`."""

    def add(function: Init) -> Init:
        INITS[name] = Initialisation(function, subtracts, leaves, needs, options, freezes, reads_weight)
        return function

    return add


def find(name: bool | str) -> Initialisation | None:
    """Return the initialisation that ``name`` means, or None."""
    key = _key(name)
    return INITS.get(key) or PAIRS.get(key)


def _found(name: bool | str) -> Initialisation:
    found = find(name)
    assert found is not None, name  # the configuration has been checked
    return found


def initialise(name: bool | str, request: InitRequest) -> Factors:
    """Return the logical factors that the initialisation ``name`` gives, in float32."""
    if request.experts:
        return _each_expert(name, request)
    number = _parsed(name)[1]
    return _found(name).function(replace(request, number=number) if number else request)


def leftover(name: bool | str, request: InitRequest) -> Tensor | None:
    """Return what the initialisation leaves of the base weight, ``[…, out, in]``; None: the weight without the delta.

    An embedding keeps its weight.
    """
    leaves = _found(name).leaves
    if leaves is None or request.lookup:
        return None
    return torch.stack(list(map(leaves, _of_experts(request)))) if request.experts else leaves(request)


def made_by(function: Init, request: InitRequest) -> Factors:
    """Return the logical factors that a function makes; of stacked experts, those that it makes of each alone."""
    if not request.experts:
        return function(request)
    made = [function(one) for one in _of_experts(request)]
    return Factors(torch.stack([pair.a for pair in made]), torch.stack([pair.b for pair in made]))


def _each_expert(name: bool | str, request: InitRequest) -> Factors:
    """Return a stack of pairs, each as it would be for that expert's weight alone."""
    return made_by(lambda one: initialise(name, one), request)


def _of_experts(request: InitRequest) -> Iterator[InitRequest]:
    """Yield the request for every expert alone."""
    weights = functools.cache(request.weight)
    shape_a, shape_b = request.shape_a[1:], request.shape_b[1:]
    for expert in range(request.experts):
        weight = lambda expert=expert: weights()[expert]  # noqa: E731
        yield replace(request, experts=0, shape_a=shape_a, shape_b=shape_b, weight=weight)


def subtracts(name: bool | str, *, lookup: bool) -> bool:
    """Whether the initialisation ``name`` changes the base weight of a layer.

    Args:
        name: as in ``LoraConfig.init_lora_weights``.
        lookup: whether the layer is an embedding: those start as by default (PEFT's meaning of the same files).
    """
    return _found(name).subtracts and not lookup


def reads_weight(name: bool | str, *, lookup: bool) -> bool:
    """Whether the initialisation ``name`` always works the factors out from the base weight; see :func:`subtracts`."""
    found = _found(name)
    return found.reads_weight or (found.subtracts and not lookup and not found.needs)


def freezes(name: bool | str) -> tuple[str, ...]:
    """Return the factors that do not train after the initialisation ``name``: ``"a"``, ``"b"``."""
    found = find(name)
    return () if found is None else found.freezes


def _key(name: bool | str) -> bool | str:
    return _parsed(name)[0]


@functools.lru_cache(maxsize=64, typed=True)
def _parsed(name: bool | str) -> tuple[bool | str, int]:
    """Return the name in the registry, and the number that a name ends with (0: none)."""
    if isinstance(name, bool):
        return name, 0
    number = re.search(r"\d+$", name)
    return re.sub(r"_\d+$", "_N", name.lower()), int(number[0]) if number else 0


def target_generator(seed: int, target: str) -> torch.Generator:
    """Return a CPU generator for one target: ``seed`` mixed with the target's name."""
    digest = hashlib.blake2b(target.encode(), key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
