"""The module that stands in the place of an adapted base layer.

::

        x ──────┬──────────── base layer W ───────────(+)── y
                └── A [r, in] ──── B [out, r] ── · s ──┘
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.errors import AdapterError
from lorica.init import Factors
from lorica.layers.switch import Switch
from lorica.ops import Op
from lorica.storage import add_low_rank_, storage_of


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
    """

    base_layer: Any  # an open set of classes; the op knows which attributes it has

    def __init__(self, base_layer: nn.Module, op: Op, switch: Switch, target_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.op = op
        self.switch = switch
        self.target_name = target_name
        self.specs: dict[str, AdapterSpec] = {}
        self.merged_adapters: list[str] = []
        self.tied: dict[str, LoraLayer] = {}
        # A list, since a bare parameter as an attribute would be registered as this module's own.
        self._untied_from: list[nn.Parameter] = []
        container = nn.ParameterDict if op.lookup else nn.ModuleDict
        for name in _container_names(op):
            self.add_module(name, container())

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

    def _containers(self) -> tuple[Any, Any]:
        first, second = _container_names(self.op)
        return self._modules[first], self._modules[second]

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
        running = self.running()
        if not running:
            return self.base_layer(*args, **kwargs)
        return self.op.forward(self, self.base_layer, running, *args, **kwargs)

    # ---- merging --------------------------------------------------------------------------------------------------

    @property
    def untied_from(self) -> nn.Parameter | None:
        """The weight that the base layer shared with another module before a merge gave it its own."""
        return self._untied_from[0] if self._untied_from else None

    @untied_from.setter
    def untied_from(self, weight: nn.Parameter | None) -> None:
        self._untied_from = [] if weight is None else [weight]

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
        factors = self.factors(adapter)
        left, right = self.op.delta(self.base_layer, factors)
        wide = torch.promote_types(left.dtype, torch.float32)
        delta = (left.to(wide) @ right.to(wide)) * self.specs[adapter].scaling
        return delta.view(self._weight().shape).to(factors.b.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add the deltas of adapters to the base weight, in place.

        Args:
            safe_merge: look for NaN and infinity in the result before the weight is touched.
            adapter_names: which adapters; None: the active ones. Those already merged are passed over.

        Raises:
            AdapterError: the result is not finite (``safe_merge``), or B has a bias and the base layer none.
            TargetError: the delta of this layer has no place in its weight (a grouped convolution).
        """
        for name in self.switch.active if adapter_names is None else adapter_names:
            if name not in self.specs:
                continue
            if name in self.merged_adapters:
                warnings.warn(f"{self.target_name}: adapter {name!r} is already merged; skipped", stacklevel=2)
                continue
            self._add_delta(name, self.specs[name].scaling, check=safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take every merged delta out of the base weight again, the last one first.

        In float32 and float64 the weight comes back up to the rounding of one addition. A 16-bit weight was rounded
        when the delta went in; then a warning says so.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        elif not self.unmerge_quietly():
            warnings.warn(inexact_message(self._weight().dtype), stacklevel=2)

    def unmerge_quietly(self) -> bool:
        """Unmerge without a warning; return whether the storage gave the weight back up to float32's rounding."""
        exact = not self.merged or storage_of(self._weight(), self.target_name).exact
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            self._add_delta(name, -self.specs[name].scaling, check=False)
            self.merged_adapters.pop()
        return exact

    def _weight(self) -> Tensor:
        weight: Tensor = getattr(self.base_layer, self.op.weight_name)
        return weight.data

    @torch.no_grad()
    def _add_delta(self, name: str, scale: float, *, check: bool) -> None:
        if name in self.tied and self.tied[name]._weight().data_ptr() == self._weight().data_ptr():
            return  # the same memory: the source's delta is this one's too
        weight, factors = self._weight(), self.factors(name)
        storage = storage_of(weight, self.target_name)
        left, right = self.op.delta(self.base_layer, factors)
        bias = getattr(self.base_layer, self.op.bias_name, None)
        if factors.bias is not None and bias is None:
            raise AdapterError(
                f"{self.target_name}: B has a bias (lora_bias) and the base layer has none to merge into"
            )
        target = weight.clone() if check else weight
        add_low_rank_(target.view(target.shape[0], -1), left, right, scale, storage)
        if check:
            if not target.isfinite().all():
                raise AdapterError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken ({self.target_name})"
                )
            weight.copy_(target)
        if factors.bias is not None and bias is not None:
            bias.data.add_(factors.bias.to(bias.dtype), alpha=scale)


def inexact_message(dtype: torch.dtype) -> str:
    """Return what is to be said when a 16-bit weight is unmerged."""
    return (
        f"Unmerged from weights stored as {dtype}: they were rounded when the delta went in, so the base weight is "
        "restored to within one rounding of that dtype, not bit for bit. Reload the base model where that matters."
    )


def _container_names(op: Op) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if op.lookup else ("lora_A", "lora_B")
