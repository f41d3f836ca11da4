"""Bare parameters: the stacked weights of a mixture's experts, and matrices that no linear layer holds.

One adapter per expert: ``A_e [r, in]``, ``B_e [out, r]``, ``ΔW_e = s·B_e·A_e``, or one pair that all experts share.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.engines.describe import Engines
from lorica.engines.kinds import is_distributed
from lorica.engines.site import Opening, Site
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.layout import Roles
from lorica.ops.adapted import AdaptedWeight, Delta
from lorica.ops.base import FactorShapes, Host, Op, Running
from lorica.ops.dropout import generator_for


class Parameter(Op):
    """A parameter ``[out, in]`` of a module that is no linear layer (a router)."""

    kind = "ParamWrapper"
    inward = True

    def __init__(self, name: str) -> None:
        self.weight_name = name

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, in]``, B ``[out, r]``."""
        *_, out_features, in_features = self.logical_shape(base)
        return FactorShapes(torch.Size((r, in_features)), torch.Size((out_features, r)))

    def check(self, base: Any, spec: AdapterSpec, where: str) -> None:
        """A parameter has no bias of its own that B's could go into."""
        if spec.bias:
            raise TargetError(f"{where}: lora_bias=True is not supported for target_parameters")

    def place(self, engines: Engines, name: str, base: nn.Module) -> Site | None:
        """The way in is the outermost forward: what engines do around the product does not concern its weights.

        A matrix must be whole: how a module of its own multiplies a slice of it is not known.
        """
        site = super().place(engines, name, base)
        if site is None:
            return None
        if site.layout.cuts and "expert" not in self.roles_weight:
            raise TargetError(f"{name}: a parameter [out, in] that is cut over {site.layout.cuts} cannot be adapted")
        return replace(site, opening=Opening(base, "forward"))

    def add(self, y: Tensor, x: Tensor, layer: Host, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Not used: the base module multiplies, see :meth:`forward`."""
        raise AssertionError("a bare parameter has no output to add to")

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``B, A``."""
        return factors.b, factors.a

    def forward(self, layer: Host, base: Callable[..., Any], running: Running, *args: Any, **kwargs: Any) -> Any:
        """Run ``base`` with the adapted weight in the parameter's place."""
        module = layer.get_base_layer()
        deltas = tuple(self._delta_of(module, factors, spec, layer) for factors, spec in running)
        weight: Any = module._parameters[self.weight_name]
        if isinstance(weight, AdaptedWeight):  # by another layer around this one
            weight.asked = True
            weight, deltas = weight.weight, weight.deltas + deltas
        adapted = AdaptedWeight(weight.to_local() if is_distributed(weight) else weight, deltas)
        with _in_place_of(module, self.weight_name, adapted, layer.target_name):
            output = base(*args, **kwargs)
        if not adapted.asked and weight.dim() == 2:  # a rank's stack of experts may have no tokens
            warnings.warn(
                f"{layer.target_name}: the forward of {type(module).__name__} did not read this parameter, so the "
                "adapter had no effect in it (another module reads it?)",
                stacklevel=2,
            )
        return output

    def _delta_of(self, module: nn.Module, factors: Factors, spec: AdapterSpec, layer: Host) -> Delta:
        left, right = self.delta(module, layer.in_forward(factors, spec))
        generator = None
        if spec.dropout and layer.training and layer.site is not None:
            generator = generator_for(left.device, spec, layer.site)
        return Delta(left, right, spec, layer, generator)


class Experts(Parameter):
    """Stacked weights ``[E, out, in]``, or ``[E, in, out]`` where the module says ``is_transposed``; A is
    ``[E, r, in]``, B is ``[E, out, r]``."""

    roles_a: Roles = ("expert", "rank", "in")
    roles_b: Roles = ("expert", "out", "rank")

    def __init__(self, name: str, *, turned: bool) -> None:
        super().__init__(name)
        self.turned = turned
        self.roles_weight = ("expert", "in", "out") if turned else ("expert", "out", "in")

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[E, r, in]``, B ``[E, out, r]``."""
        a, b = super().factor_shapes(base, r)
        count = self.logical_shape(base)[:1]
        return FactorShapes(count + a, count + b)

    def orient(self, weight: Tensor) -> Tensor:
        """``[E, out, in]``, a view."""
        return weight.mT if self.turned else weight

    def delta(self, base: Any, factors: Factors) -> tuple[Tensor, Tensor]:
        """``B, A`` of every expert, or ``Aᵀ, Bᵀ``."""
        return (factors.a.mT, factors.b.mT) if self.turned else (factors.b, factors.a)


class SharedExperts(Experts):
    """The same with one A ``[r, in]`` and one B ``[out, r]`` for all experts (``share_expert_adapters``)."""

    roles_a = ("rank", "in")
    roles_b = ("out", "rank")

    def factor_shapes(self, base: Any, r: int) -> FactorShapes:
        """A ``[r, in]``, B ``[out, r]``."""
        return Parameter.factor_shapes(self, base, r)


@functools.cache
def experts_op(name: str, *, turned: bool, shared: bool) -> Experts:
    """Return the op of stacked experts' parameter ``name``; the same one for the same question."""
    return (SharedExperts if shared else Experts)(name, turned=turned)


@functools.cache
def matrix_op(name: str) -> Parameter:
    """Return the op of a bare matrix ``name``."""
    return Parameter(name)


@contextmanager
def _in_place_of(module: nn.Module, name: str, adapted: AdaptedWeight, where: str) -> Iterator[None]:
    """Let ``module`` find the adapted weight where its parameter was.

    Raises:
        RuntimeError: something else put a weight of its own there, so that the adapter had no part in the forward.
    """
    parameters: dict[str, Any] = module._parameters
    weight, parameters[name] = parameters[name], adapted
    try:
        yield
        if parameters[name] is not adapted:
            raise RuntimeError(
                f"{where}: something replaced the parameter during the forward (a hook that loads weights?), so the "
                "adapter had no effect"
            )
    finally:
        if parameters[name] is adapted:
            parameters[name] = weight
