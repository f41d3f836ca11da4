"""The module that stands in the place of an adapted base layer.

::

        x ──────┬──────────── base layer W ───────────(+)── y
                └── A [r, in] ──── B [out, r] ── · s ──┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.engines.kinds import is_distributed
from lorica.engines.site import Site
from lorica.errors import AdapterError, LayoutError
from lorica.init import Factors
from lorica.layers import lean
from lorica.layers.across import Across, places
from lorica.layers.holders import Container, Factor, Tensors
from lorica.layers.mixed import add_by_rows, refuse_merged
from lorica.layers.names import container_names, plain_names
from lorica.layers.scaled import Scaled
from lorica.layers.sharded import Sharded, state_of_factors
from lorica.layers.switch import Switch
from lorica.layout import Roles
from lorica.ops import Op
from lorica.ops.base import Host
from lorica.routing import Rows
from lorica.variants import VARIANTS, Extra, Variant

#: Adapters that take part in a forward.
Running = list[tuple[Factors, AdapterSpec]]


class LoraLayer(Sharded, Scaled):
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

    inner = "base_layer"
    base_layer: Any  # an open set of classes; the op knows which attributes it has
    tied: dict[str, LoraLayer]
    extras: dict[str, dict[str, Extra]]
    lean: Any  # a lean.Lean, once a forward has looked
    family: Any = None  # a sharing.Family, where the layer has one
    masks: Any = None  # sharing.Masks, likewise

    def __init__(
        self, base_layer: nn.Module, op: Op, switch: Switch, target_name: str, site: Site | None = None
    ) -> None:
        super().__init__(
            op=op, switch=switch, target_name=target_name, site=None, specs={}, tied={}, extras={}, lean=None
        )
        # add_module would find the containers' names in a layer inside this one
        self._modules["base_layer"] = base_layer
        for name in container_names(op):
            self._modules[name] = nn.ParameterDict() if op.lookup else Container()
        if site is not None:
            self.settle(site)

    def settle(self, site: Site | None) -> None:
        """Take the place among the ranks that ``site`` describes; the factors are not touched."""
        self.leave()
        self.notes.clear()
        self.lean = None
        self.site = site
        for place in places(site):
            place.opening.put(partial(self._inside, place))

    def leave(self) -> None:
        """Give the base layer its own forward back, when it is about to stand alone again."""
        for place in places(self.site):
            place.opening.close()
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

    def add_adapter(
        self, name: str, spec: AdapterSpec, factors: Factors, *, subtract: bool = False, seed: int = 0
    ) -> None:
        """Take in an adapter. ``factors`` become parameters as they are: on their device, in their dtype.

        Args:
            name: the adapter's name.
            spec: rank, scale and the rest.
            factors: what its initialisation made.
            subtract: take their delta out of the base weight for good. For factors on the meta device this is noted
                in :attr:`owed`, to be done with the factors that the adapter started from.
            seed: of what the variant draws for itself.
        """
        self._look_again()
        a, b = nn.Parameter(factors.a), nn.Parameter(factors.b)
        first, second = self._containers()
        if self.op.lookup:
            first[name], second[name] = a, b
        else:
            bias = None if factors.bias is None else nn.Parameter(factors.bias)
            first._modules[name], second._modules[name] = Factor(a), Factor(b, bias)
        self.specs[name] = spec
        if subtract and b.is_meta:
            self.owed.add(name)
        elif subtract:
            self.subtract(name, factors)
        self._add_extras(name, spec, seed)

    def _add_extras(self, name: str, spec: AdapterSpec, seed: int) -> None:
        variant = VARIANTS[spec.variant]
        if type(variant).extras is Variant.extras:
            return
        factors = self.whole_factors(name)
        extras = variant.extras(self, factors, spec)
        if not extras:
            return
        starts = {} if factors.b.is_meta else variant.start(self, factors, spec, seed)
        for extra in extras:
            start = starts.get(extra.name)
            value = factors.b.new_empty(extra.shape) if start is None else start.to(factors.b.dtype).view(extra.shape)
            self._put(extra, name, value)
        self.extras[name] = {extra.name: extra for extra in extras}

    def _put(self, extra: Extra, adapter: str, value: Tensor) -> None:
        """Make a tensor a parameter (or a buffer) under its live name."""
        if extra.container not in self._modules:
            self._modules[extra.container] = nn.ModuleDict() if extra.tensor else Tensors()
        held: Any = self._modules[extra.container]
        if extra.tensor and adapter not in held:
            held[adapter] = nn.Module()
        owner, key = (held[adapter], extra.tensor) if extra.tensor else (held, adapter)
        if extra.trains:
            owner.register_parameter(key, nn.Parameter(value))
        else:
            owner.register_buffer(key, value)

    def tie_adapter(self, name: str, spec: AdapterSpec, source: LoraLayer) -> None:
        """Take in an adapter whose factors are those of ``source``: a layer of the same kind, or an embedding with the
        same weight, transposed."""
        self.lean = None
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
            first, second = self._containers()
            if self.op.lookup:
                del first[name], second[name]
            else:
                del first._modules[name], second._modules[name]
            if name in self.extras:
                for key in {extra.container for extra in self.extras.pop(name).values()}:
                    container: Any = self._modules[key]
                    del container[name]
                    if not (container._modules or container._parameters or container._buffers):
                        del self._modules[key]
        self.owed.discard(name)
        self.notes.clear()
        self._look_again()

    def _look_again(self) -> None:
        """Let the next forward look anew at what this layer has."""
        self.__dict__["lean"] = None  # past nn.Module.__setattr__, which takes longer than the rest of a change

    def factors(self, name: str) -> Factors:
        """Return the factors of an adapter, attached to the graph."""
        if name in self.tied:
            source = self.tied[name].factors(name)
            return source if self.tied[name].op is self.op else Factors(source.b.T, source.a.T)
        first, second = self._containers()
        extras = self._extra_tensors(name) if name in self.extras else {}
        if self.op.lookup:
            return Factors(first[name], second[name], None, extras)
        a, b = first._modules[name], second._modules[name]
        return Factors(_weight_of(a), _weight_of(b), b.bias, extras)

    def own_parameters(self, name: str) -> list[tuple[str, nn.Parameter | None]]:
        """Return the parameters that this layer holds for an adapter, with their names in :class:`Factors`; nothing of
        one that is tied, or that it does not have. None stands where something else took a parameter's place (pruning).
        """
        if name not in self.specs or name in self.tied:
            return []
        first, second = self._containers()
        held: list[tuple[str, Any]]
        if self.op.lookup:
            held = [("a", first[name]), ("b", second[name])]
        else:
            a, b = first._modules[name]._parameters, second._modules[name]._parameters
            held = [("a", a.get("weight")), ("b", b.get("weight"))]
            if "bias" in b:
                held.append(("bias", b["bias"]))
        if name in self.extras:
            extras = self._extra_tensors(name).items()
            held += [(key, tensor) for key, tensor in extras if isinstance(tensor, nn.Parameter)]
        return held

    def let_train(self, wanted: Mapping[str, bool]) -> None:
        """Let the parameters of adapters train or not; those that never train (:attr:`AdapterSpec.frozen`) do not.

        Args:
            wanted: adapter → whether its parameters train.
        """
        tied, plain = self.tied, not (self.op.lookup or self.extras)
        containers = self._containers()
        for name, spec in self.specs.items():
            trains = wanted.get(name)
            if trains is None or name in tied:
                continue
            if plain and not spec.frozen:  # what own_parameters gives; this is most of the work of a switch
                for container in containers:
                    for parameter in container._modules[name]._parameters.values():
                        if parameter is not None:
                            parameter.requires_grad = trains
                continue
            for key, parameter in self.own_parameters(name):
                if parameter is not None:
                    parameter.requires_grad = trains and key not in spec.frozen

    def _extra_tensors(self, adapter: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, extra in self.extras[adapter].items():
            held: Any = self._modules[extra.container]
            found[name] = getattr(held[adapter], extra.tensor) if extra.tensor else held[adapter]
        return found

    def factor_names(self, name: str) -> Mapping[str, str]:
        """Return, for each factor tensor, its name in a file → its name below this module.

        A tied adapter has entries too; their parameters do not exist below this module.
        """
        names = plain_names(self.op.lookup, self.specs[name].bias, name)
        return (
            names | {key: extra.live(name) for key, extra in self.extras[name].items()}
            if name in self.extras
            else names
        )

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
        roles = dict(zip(self.factor_names(adapter), self.factor_roles(adapter), strict=True))[factor]
        return self.op.windows(path, factor, self.specs[adapter], self.base_layer, shape, roles)

    def factor_roles(self, name: str) -> list[Roles]:
        """Return the role of each dimension of each factor tensor, in the order of :meth:`factor_names`."""
        spec = self.specs[name]
        roles = [*VARIANTS[spec.variant].roles(self.op, spec)]
        if spec.bias:
            roles.append(self.op.roles_bias)
        return roles + [extra.roles for extra in self.extras.get(name, {}).values()]

    def _own_state(self, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
        return state_of_factors(self, prefix, sharded_offsets)

    def _containers(self) -> tuple[Any, Any]:
        first, second = container_names(self.op)
        return self._modules[first], self._modules[second]

    # ---- forward --------------------------------------------------------------------------------------------------

    def running(self) -> Running:
        """Return the adapters that take part in a forward: active, of this layer, and not merged."""
        return self.pairs(self._names())

    def _names(self, place: Site | None = None) -> list[str]:
        """Return the adapters that take part in a forward, and that are added at a place if one is given."""
        if not self.switch.enabled:
            if self.merged_adapters:
                self.unmerge_once()
            return []
        specs, rows, active = self.specs, self.switch.rows, self.switch.active
        if rows is not None and rows.names is not None:
            refuse_merged(self)
            active = tuple(rows.adapters)
        merged = self.merged_adapters
        names = [name for name in active if name in specs and name not in merged]
        return names if place is None else [name for name in names if self.site_of(specs[name]) is place]

    def pairs(self, names: Iterable[str]) -> Running:
        """Return factors and spec of each of the named adapters."""
        return [(self.factors(name), self.specs[name]) for name in names]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's output plus the parts of the running adapters (of those in ``adapter_names``, one for
        each row of the input, where they are given)."""
        if len(args) == 1 and not kwargs and (output := lean.forward(self, args[0])) is not None:
            return output
        if "adapter_names" in kwargs:
            with self.switch.routed(Rows(kwargs.pop("adapter_names"))):
                return self.forward(*args, **kwargs)
        base = self.base_layer
        if self.site is not None:
            if self.site.opening is not None:
                return base(*args, **kwargs)  # whose engine calls _inside, between its collectives
            return self._around(self, base, self._names(), *args, **kwargs)
        names = self._names()
        if names and self.training and is_distributed(base._parameters.get(self.op.weight_name)):
            raise LayoutError(
                f"{self.target_name}: the model was cut after the adapter was added; cut it inside "
                "`with lorica.parallel.cutting(model) as base:`, so that the adapter is cut with it"
            )
        return self._with(self, base, names, *args, **kwargs)

    def _inside(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        assert site.opening is not None
        layer = self if site is self.site else Across(self, site)
        return self._around(layer, site.opening.original, self._names(site), *args, **kwargs)

    def add(self, y: Tensor, x: Tensor, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Return the output ``y`` with the part that an adapter, of whichever variant, adds for the input ``x``."""
        return VARIANTS[spec.variant].add(y, x, self, factors, spec)

    def in_forward(self, factors: Factors, spec: AdapterSpec) -> Factors:
        """Return the factors of plain LoRA that an adapter, of whichever variant, amounts to in this forward."""
        return VARIANTS[spec.variant].in_forward(self, factors, spec)

    def _around(self, layer: Host, base: Callable[..., Any], names: list[str], *args: Any, **kwargs: Any) -> Any:
        output = self._with(layer, base, names, *args, **kwargs)
        if names and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self.switch.gradients_changed)  # type: ignore[no-untyped-call]
        return output

    def _with(self, layer: Host, base: Callable[..., Any], names: list[str], *args: Any, **kwargs: Any) -> Any:
        if self.op.inward and not torch.compiler.is_compiling():  # one thread's deltas are in the module's weights
            with self.switch.turns.alone(self):
                return self._added(layer, base, names, *args, **kwargs)
        return self._added(layer, base, names, *args, **kwargs)

    def _added(self, layer: Host, base: Callable[..., Any], names: list[str], *args: Any, **kwargs: Any) -> Any:
        rows = self.switch.rows
        if rows is not None and rows.names is not None:
            return add_by_rows(layer, base, rows, names, *args, **kwargs)
        if not names:
            return base(*args, **kwargs)
        return self.op.forward(layer, base, self.pairs(names), *args, **kwargs)

    @property
    def rows(self) -> Rows | None:
        """Which adapter each row of the batch has, while a forward runs that says so."""
        return self.switch.rows

    def site_of(self, spec: AdapterSpec) -> Site | None:
        """Return where an adapter's part is added: inside the base layer's collectives, or across them."""
        if self.site is None or self.site.across is None or not (spec.a2a and VARIANTS[spec.variant].across):
            return self.site
        return self.site.across

    def get_base_layer(self) -> nn.Module:
        """Return the module that is adapted, inside the layers on its other parameters."""
        base: nn.Module = self.base_layer
        return base.get_base_layer() if isinstance(base, LoraLayer) else base


def _weight_of(factor: Any) -> Tensor:
    """Return ``factor.weight``, past the questions that ``nn.Module`` asks first; and where it is no parameter now."""
    weight: Tensor | None = factor._parameters.get("weight")
    if weight is None:
        weight = factor.weight
    return weight
