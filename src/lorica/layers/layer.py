"""The module that stands in the place of an adapted base layer.

::

        x ──────┬──────────── base layer W ───────────(+)── y
                └── A [r, in] ──── B [out, r] ── · s ──┘
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.engines.rest import at_rest, unshard
from lorica.engines.site import Site
from lorica.errors import AdapterError
from lorica.init import Factors
from lorica.layers.switch import Switch
from lorica.layout import Roles
from lorica.ops import Op
from lorica.storage import Term, add_low_rank_, storage_of


class Factor(nn.Module):
    """One factor of a product op, and the bias of B if it has one. It holds parameters; the op does the arithmetic."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


class LoraLayer(nn.Module):
    """A base layer and the factors of any number of adapters.

    What is not found here is looked up in the base layer, so that code that asks an adapted layer for ``weight``,
    ``in_features`` or ``embed_dim`` gets the base layer's.

    Args:
        base_layer: the frozen module that is adapted.
        op: its mathematics.
        switch: which adapters are on, shared with the other layers of the model.
        target_name: full name of the module in the base model, for messages.
        site: where the base layer lies among the ranks; None on one process.
    """

    base_layer: Any  # an open set of classes; the op knows which attributes it has

    def __init__(
        self, base_layer: nn.Module, op: Op, switch: Switch, target_name: str, site: Site | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site: Site | None = None
        self.op = op
        self.switch = switch
        self.target_name = target_name
        self.specs: dict[str, AdapterSpec] = {}
        self.merged_adapters: list[str] = []
        self.owed: set[str] = set()
        self.notes: dict[Any, Any] = {}
        self._gains: dict[str, Tensor | None] = {}
        self.tied: dict[str, LoraLayer] = {}
        # A list, since a bare parameter as an attribute would be registered as this module's own.
        self._untied_from: list[nn.Parameter] = []
        container = nn.ParameterDict if op.lookup else nn.ModuleDict
        for name in _container_names(op):
            self.add_module(name, container())
        self.settle(site)

    def settle(self, site: Site | None) -> None:
        """Take the place among the ranks that ``site`` describes; the factors are not touched."""
        self.leave()
        self.site = site
        if site is not None and site.opening is not None:
            site.opening.put(self._inside)

    def leave(self) -> None:
        """Give the base layer its own forward back, when it is about to stand alone again."""
        if self.site is not None and self.site.opening is not None:
            self.site.opening.close()
        self.site = None

    def __getattr__(self, name: str) -> Any:
        """Look in the base layer for what this module does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("__"):
                raise
            return getattr(base, name)

    def _get_name(self) -> str:
        return f"lora.{self.op.kind}"

    # ---- adapters -------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, spec: AdapterSpec, factors: Factors) -> None:
        """Take in an adapter. ``factors`` become parameters as they are: on their device, in their dtype."""
        a, b = nn.Parameter(factors.a), nn.Parameter(factors.b)
        first, second = self._containers()
        if self.op.lookup:
            first[name], second[name] = a, b
        else:
            bias = None if factors.bias is None else nn.Parameter(factors.bias)
            first[name], second[name] = Factor(a), Factor(b, bias)
        self.specs[name] = spec

    def tie_adapter(self, name: str, spec: AdapterSpec, source: LoraLayer) -> None:
        """Take in an adapter whose factors are those of ``source``, an embedding with the same weight, transposed."""
        self.specs[name] = spec
        self.tied[name] = source

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; one that this layer does not have is no error.

        Raises:
            AdapterError: the adapter is merged into the base weight.
        """
        if name in self.merged_adapters:
            raise AdapterError(f"{self.target_name}: adapter {name!r} is merged; unmerge it before deleting it")
        if self.specs.pop(name, None) is not None and self.tied.pop(name, None) is None:
            for container in self._containers():
                del container[name]

    def factors(self, name: str) -> Factors:
        """Return the factors of an adapter, attached to the graph."""
        if name in self.tied:
            source = self.tied[name].factors(name)
            return Factors(source.b.T, source.a.T)
        first, second = self._containers()
        if self.op.lookup:
            return Factors(first[name], second[name])
        a, b = first[name], second[name]
        return Factors(a.weight, b.weight, b.bias)

    def factor_names(self, name: str) -> dict[str, str]:
        """Return, for each factor tensor, its name in a file → its name below this module.

        A tied adapter has entries too; their parameters do not exist below this module.
        """
        first, second = _container_names(self.op)
        if self.op.lookup:
            return {first: f"{first}.{name}", second: f"{second}.{name}"}
        names = {f"{first}.weight": f"{first}.{name}.weight", f"{second}.weight": f"{second}.{name}.weight"}
        if self.specs[name].bias:
            names[f"{second}.bias"] = f"{second}.{name}.bias"
        return names

    def windows(
        self, path: str, factor: str, adapter: str, shape: torch.Size
    ) -> list[tuple[str, tuple[slice, ...] | None]]:
        """Return the names in a file that one factor tensor has, and which part of it each name means.

        Args:
            path: name of this layer in the model.
            factor: name of the tensor in a file, below this layer.
            adapter: whose.
            shape: its logical shape.
        """
        return self.op.windows(path, factor, self.specs[adapter], self.base_layer, shape)

    def factor_roles(self, name: str) -> list[Roles]:
        """Return the role of each dimension of each factor tensor, in the order of :meth:`factor_names`."""
        roles = [self.op.roles_a, self.op.roles_b]
        return [*roles, self.op.roles_bias] if self.specs[name].bias else roles

    def _containers(self) -> tuple[Any, Any]:
        first, second = _container_names(self.op)
        return self._modules[first], self._modules[second]

    # ---- scale ------------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to ``scale`` times what its rank and alpha give.

        Raises:
            AdapterError: the adapter is merged with its present scale.
        """
        if adapter in self.specs:
            self._rescale(adapter, scale * self.specs[adapter].natural_scaling)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter by ``scale``."""
        for adapter in self.switch.active:
            if adapter in self.specs:
                self._rescale(adapter, scale * self.specs[adapter].scaling)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter by ``scale``; without one, set it back to what it was."""
        for adapter in self.switch.active:
            if adapter in self.specs:
                spec = self.specs[adapter]
                self._rescale(adapter, spec.natural_scaling if scale is None else spec.scaling / scale)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters of the model."""
        return list(self.switch.active)

    @property
    def disable_adapters(self) -> bool:
        """Whether the model's adapters are turned off."""
        return not self.switch.enabled

    @property
    def r(self) -> Mapping[str, int]:
        """The rank of each adapter."""
        return MappingProxyType({name: spec.r for name, spec in self.specs.items()})

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        """The α of each adapter."""
        return MappingProxyType({name: spec.alpha for name, spec in self.specs.items()})

    @property
    def scaling(self) -> Mapping[str, float]:
        """The scale ``s`` of each adapter; :meth:`set_scale` changes it."""
        return MappingProxyType({name: spec.scaling for name, spec in self.specs.items()})

    def _rescale(self, adapter: str, scaling: float) -> None:
        if adapter in self.merged_adapters:
            raise AdapterError(f"{self.target_name}: adapter {adapter!r} is merged; unmerge it before scaling it")
        self.specs[adapter] = replace(self.specs[adapter], scaling=scaling)

    # ---- forward --------------------------------------------------------------------------------------------------

    def running(self) -> list[tuple[Factors, AdapterSpec]]:
        """Return the adapters that take part in a forward: active, of this layer, and not merged."""
        if not self.switch.enabled:
            if self.merged_adapters:
                self.unmerge()
            return []
        merged, specs = self.merged_adapters, self.specs
        return [(self.factors(n), specs[n]) for n in self.switch.active if n in specs and n not in merged]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's output plus the parts of the running adapters."""
        if "adapter_names" in kwargs:
            raise NotImplementedError("adapter_names: batches that mix adapters are not implemented in this version")
        if self.site is not None and self.site.opening is not None:
            return self.base_layer(*args, **kwargs)  # whose engine calls _inside, between its collectives
        return self._around(self.base_layer, *args, **kwargs)

    def _inside(self, *args: Any, **kwargs: Any) -> Any:
        site = self.site
        assert site is not None
        assert site.opening is not None
        return self._around(site.opening.original, *args, **kwargs)

    def _around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = self.running()
        if not running:
            return base(*args, **kwargs)
        output = self.op.forward(self, base, running, *args, **kwargs)
        if self.site is not None and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self.switch.gradients_changed)  # type: ignore[no-untyped-call]
        return output

    # ---- merging --------------------------------------------------------------------------------------------------

    @property
    def untied_from(self) -> nn.Parameter | None:
        """The weight that the base layer shared with another module before a merge gave it its own."""
        return self._untied_from[0] if self._untied_from else None

    def give_own_weight(self) -> None:
        """Replace a base weight that another module shares with a copy, and remember the shared one."""
        shared = self.base_layer.weight
        self._untied_from = [shared]
        self.base_layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)

    def take_shared_weight(self) -> None:
        """Undo :meth:`give_own_weight`."""
        self.base_layer.weight = self._untied_from.pop()

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def get_base_layer(self) -> nn.Module:
        """Return the module that is adapted."""
        base: nn.Module = self.base_layer
        return base

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``s·B·A`` in the shape and orientation of the base weight, in the dtype of the factors.

        Raises:
            TargetError: the delta of this layer has no place in its weight (a grouped convolution).
        """
        factors = self.whole_factors(adapter)
        left, right = self.op.delta(self.base_layer, factors)
        wide = torch.promote_types(left.dtype, torch.float32)
        delta = (left.to(wide) @ right.to(wide)) * self.specs[adapter].scaling
        return delta.view(*left.shape[:1], *self.base_weight.shape[1:]).to(factors.b.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add the deltas of adapters to the base weight, in place.

        Args:
            safe_merge: look for NaN and infinity in the result before the weight is touched.
            adapter_names: which adapters; None: the active ones. Those already merged are passed over.

        Raises:
            AdapterError: the result is not finite (``safe_merge``), or B has a bias and the base layer none.
            TargetError: the delta of this layer has no place in its weight (a grouped convolution).
        """
        names = self.mergeable(self.switch.active if adapter_names is None else adapter_names)
        self.check_merge(names, finite=safe_merge)
        self._add_deltas(names, self.base_weight)
        self._add_biases(names)
        self.merged_adapters += names

    def mergeable(self, names: Iterable[str]) -> list[str]:
        """Return those adapters of ``names`` that this layer has and that are not merged yet."""
        return [name for name in names if name in self.specs and name not in self.merged_adapters]

    @torch.no_grad()
    def check_merge(self, names: Iterable[str], *, finite: bool) -> None:
        """Refuse a merge that cannot be done, before anything is touched; for the errors see :meth:`merge`.

        Args:
            names: adapters of this layer.
            finite: compute the merged weight in a copy and look for NaN and infinity.
        """
        for name in names:
            storage_of(self.base_weight, self.target_name)
            self.op.delta(self.base_layer, self.whole_factors(name))
            if self.specs[name].bias and getattr(self.base_layer, self.op.bias_name, None) is None:
                raise AdapterError(
                    f"{self.target_name}: B has a bias (lora_bias) and the base layer has none to merge it into"
                )
            if finite:
                trial = self.base_weight.clone()
                self._add_deltas([name], trial)
                if not trial.isfinite().all():
                    raise AdapterError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken "
                        f"({self.target_name})"
                    )

    def unmerge(self) -> None:
        """Take every merged delta out of the base weight again.

        In float32 and float64 the weight comes back up to the rounding of one addition. A 16-bit weight was rounded
        when the delta went in; then a warning says so.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        elif not self.unmerge_quietly():
            warnings.warn(inexact_message(self.base_weight.dtype), stacklevel=2)

    def unmerge_quietly(self) -> bool:
        """Unmerge without a warning; return whether the storage gave the weight back up to float32's rounding."""
        exact = not self.merged or storage_of(self.base_weight, self.target_name).exact
        self._add_deltas(self.merged_adapters, self.base_weight, sign=-1)
        self._add_biases(self.merged_adapters, sign=-1)
        self.merged_adapters = []
        return exact

    @property
    def base_weight(self) -> Tensor:
        """What this rank holds of the base layer's weight that the deltas belong to, detached."""
        weight: Tensor = getattr(self.base_layer, self.op.weight_name)
        return at_rest(weight.data).local

    def whole_factors(self, name: str) -> Factors:
        """Return an adapter's factors as they are in a forward, detached: gathered where they are sharded at rest."""
        a, b, bias = self.factors(name)
        return Factors(unshard(a.detach()), unshard(b.detach()), None if bias is None else unshard(bias.detach()))

    @torch.no_grad()
    def _add_deltas(self, names: Sequence[str], weight: Tensor, sign: int = 1) -> None:
        terms = []
        rows, columns = self._share_at_rest()
        for name in names:
            if name in self.tied and self.tied[name].base_weight.data_ptr() == weight.data_ptr():
                continue  # the same memory: the source's delta is this one's too
            left, right = self.op.delta(self.base_layer, self.whole_factors(name))
            terms.append(Term(left[rows], right[:, columns], sign * self.specs[name].scaling))
        if not terms:
            return
        matrix = weight.flatten(1)
        add_low_rank_(matrix, terms, storage_of(weight, self.target_name))
        if matrix.data_ptr() != weight.data_ptr():  # a kernel stored channels last has no two-dimensional view
            weight.copy_(matrix.view(weight.shape))

    def _share_at_rest(self) -> tuple[slice, slice]:
        """Return which rows and columns of this rank's delta belong to the weight that it keeps between forwards."""
        held = at_rest(getattr(self.base_layer, self.op.weight_name).data, self.site)
        rows, *others = held.slices
        if len(others) > 1 and any(other != slice(None) for other in others):
            raise AdapterError(f"{self.target_name}: a kernel that is sharded along {held.slices} cannot take a delta")
        return rows, others[0] if len(others) == 1 else slice(None)

    @torch.no_grad()
    def _add_biases(self, names: Sequence[str], sign: int = 1) -> None:
        for name in names:
            bias = self.whole_factors(name).bias
            if bias is not None:
                held = at_rest(getattr(self.base_layer, self.op.bias_name).data, self.site)
                held.local.add_(bias[held.slices].to(held.local), alpha=sign * self.specs[name].scaling)


def inexact_message(dtype: torch.dtype) -> str:
    """Return what is to be said when a 16-bit weight is unmerged."""
    return (
        f"Unmerged from weights stored as {dtype}: they were rounded when the delta went in, so the base weight is "
        "restored to within one rounding of that dtype, not bit for bit. Reload the base model where that matters."
    )


def _container_names(op: Op) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if op.lookup else ("lora_A", "lora_B")
