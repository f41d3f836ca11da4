"""The short way through an adapted linear layer: one kernel for the base product and the delta.

It is taken where nothing comes in between: a dense ``nn.Linear`` that is whole and has no hooks, one running adapter
whose part is plain LoRA's (what DoRA does comes after it), an eager forward. Everything else goes through
:meth:`lorica.ops.Op.forward`, which the short way must equal. What it needs is looked up once and kept; each forward
asks only what may have changed since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from lorica.config.spec import AdapterSpec
from lorica.kernels import Dropped, Projection, asked, draw_seed, kernel_for
from lorica.kernels.function import in_reverse
from lorica.layers.sharing import Family, Masks, may_share
from lorica.ops.linear import Linear
from lorica.variants import VARIANTS, Variant

# Torch's own; what a library puts in its place later is not what the kernels compute.
_LINEAR_FORWARD = nn.Linear.forward
_has_global_hooks: Callable[[], bool] = torch_modules._has_any_global_hook
#: Whether any device's autocast is on, which is answered before a device is asked for.
_autocasts: Callable[[], bool] = torch._C._is_any_autocast_enabled


class Lean:
    """What the short way needs of one layer.

    Args:
        layer: the adapted layer.

    Attributes:
        active: the switch's active adapters when this was looked up; others need another look.
        fits: whether the short way can be taken with these.
        variant: what makes something else of the kernel's output; None: nothing does.
    """

    __slots__ = ("active", "adapter", "base", "fits", "hooks", "own", "parameters", "spec", "variant")

    def __init__(self, layer: Any) -> None:
        self.active: tuple[str, ...] = layer.switch.active
        names = [name for name in self.active if name in layer.specs]
        self.fits = len(names) == 1 and _is_plain(layer, names[0])
        if not self.fits:
            return
        base: nn.Module = layer.base_layer
        self.adapter = names[0]
        self.spec: AdapterSpec = layer.specs[self.adapter]
        variant = VARIANTS[self.spec.variant]
        self.variant = None if type(variant).after is Variant.after else variant
        self.base = base
        self.own = base.__dict__
        self.parameters = base._parameters
        self.hooks = (base._forward_pre_hooks, base._forward_hooks, base._backward_pre_hooks, base._backward_hooks)

    def __deepcopy__(self, memo: Any) -> None:
        """Return nothing: a copied layer looks for itself."""

    def __reduce__(self) -> Any:
        return (type(None), ())

    def ready(self, state: dict[str, Any], dtype: torch.dtype, *, autocast: bool) -> bool:
        """Tell whether the short way can be taken now.

        Args:
            state: the layer's ``__dict__``.
            dtype: of the input.
            autocast: whether weights of another dtype follow it.
        """
        if state["specs"].get(self.adapter) is not self.spec or state["_modules"].get("base_layer") is not self.base:
            state["lean"] = None  # the next forward looks again
            return False
        if state["merged_adapters"] or "forward" in self.own or type(self.base).forward is not _LINEAR_FORWARD:
            return False
        if any(self.hooks):
            return False
        if self.spec.dropout and state["training"] and not in_reverse():
            return False  # torch's own dropout knows about transformations and tracers
        a, b = self._factors(state)
        if type(a) not in _PLAIN or type(b) not in _PLAIN:
            return False
        # A parametrised tensor is no entry; one that is not there is one of None.
        bias = self.parameters.get("bias", self)
        frozen = _is_frozen(self.parameters.get("weight"), dtype, autocast)
        return frozen and (bias is None or _is_frozen(bias, dtype, autocast))

    def _factors(self, state: dict[str, Any]) -> tuple[Any, Any]:
        modules, name = state["_modules"], self.adapter
        first, second = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return first._parameters.get("weight"), second._parameters.get("weight")

    def dropout(self, state: dict[str, Any]) -> float:
        """Return the probability with which an element of the input is dropped now."""
        return self.spec.dropout if state["training"] else 0.0

    def projection(self, state: dict[str, Any], dropped: Dropped | None) -> Projection:
        """Return the layer in plain tensors."""
        spec, parameters = self.spec, self.parameters
        weight: Any = parameters["weight"]
        a, b = self._factors(state)
        return Projection(weight, parameters["bias"], a, b, spec.scaling, dropped)

    def finish(self, layer: Any, z: Tensor) -> Tensor:
        """Return the layer's output, given the kernel's."""
        variant = self.variant
        return z if variant is None else variant.after(z, layer, layer.factors(self.adapter), self.spec)


#: Classes of the factors: a call with other tensors in their places gives bare ones.
_PLAIN = (nn.Parameter, Tensor)


def _is_frozen(tensor: Any, dtype: torch.dtype, autocast: bool) -> bool:
    return type(tensor) is nn.Parameter and not tensor.requires_grad and (autocast or tensor.dtype == dtype)


def forward(layer: Any, x: Any) -> Tensor | None:
    """Return the layer's output for the input ``x``; None where the short way cannot be taken."""
    switch = layer.__dict__["switch"]
    if not is_open(x) or not switch.enabled or (switch.routing and switch.rows is not None):
        return None
    return in_dtype(_output, layer, x)


def is_open(x: Any) -> bool:
    """Tell whether any short way can be taken for an input now."""
    plainly = torch.compiler.is_compiling() or type(x) is not Tensor or asked() == "plain"
    return not (plainly or _has_global_hooks())


def in_dtype(run: Callable[..., Tensor | None], owner: Any, x: Tensor) -> Tensor | None:
    """Return ``run(owner, x, dtype, autocast=…)``, outside autocast but with the dtype that it decided on."""
    if not _autocasts():
        return run(owner, x, x.dtype, autocast=False)
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return run(owner, x, x.dtype, autocast=False)
    with torch.autocast(device, enabled=False):
        return run(owner, x, torch.get_autocast_dtype(device), autocast=True)


def _output(layer: Any, x: Tensor, dtype: torch.dtype, *, autocast: bool) -> Tensor | None:
    state = layer.__dict__
    lean = find(layer, dtype, autocast=autocast, plain=False)
    if lean is None:
        return None
    if may_share() and (family := state.get("family")) is not None:
        taken: Tensor | None = family.taken(layer, x)
        if taken is not None:
            return taken
        if (family := state.get("family")) is not None:  # it may have left
            return _together(family, layer, lean, x, dtype, autocast=autocast)
    projection = lean.projection(state, drawn(layer, lean.dropout(state), x))
    x = x.to(dtype) if autocast else x
    run: Callable[..., Tensor] = kernel_for("projection", x, projection)
    z = run(x, projection)
    return z if lean.variant is None else lean.finish(layer, z)


def _together(family: Family, layer: Any, lean: Lean, x: Tensor, dtype: torch.dtype, *, autocast: bool) -> Tensor:
    """Compute a layer's output, and those of the layers that are taken to get the same input."""
    p = lean.dropout(layer.__dict__)
    dropped = drawn(layer, p, x)
    members, leans, items = [layer], [lean], [lean.projection(layer.__dict__, dropped)]
    for member in family.others(layer):
        state = member.__dict__
        theirs = find(member, dtype, autocast=autocast, plain=False)
        if theirs is not None and theirs.dropout(state) == p and drawn(member, p, x) == dropped:
            members.append(member)
            leans.append(theirs)
            items.append(theirs.projection(state, dropped))
    cast = x.to(dtype) if autocast else x
    made = kernel_for("projections", cast, items)(cast, items)
    outputs = [each.finish(member, z) for each, member, z in zip(leans, members, made, strict=True)]
    family.keep(x, {id(member): y for member, y in zip(members[1:], outputs[1:], strict=True)})
    return outputs[0]


def drawn(layer: Any, p: float, x: Tensor) -> Dropped | None:
    """Return a layer's mask of dropout for an input; None where nothing is dropped.

    It takes one draw from the default generator for all neighbours that get this input.
    """
    if not p:
        return None
    masks: Masks | None = layer.__dict__.get("masks")
    return Dropped(p, draw_seed()) if masks is None else masks.dropped(p, x, layer)


def find(layer: Any, dtype: torch.dtype, *, autocast: bool, plain: bool = True) -> Lean | None:
    """Return what the short way needs of a layer; None where it cannot be taken now.

    Args:
        layer: the adapted layer.
        dtype: see :meth:`Lean.ready`.
        autocast: see :meth:`Lean.ready`.
        plain: only where the kernel's output is the layer's.
    """
    state = layer.__dict__
    lean: Lean | None = state["lean"]
    if lean is None or lean.active is not state["switch"].active:
        lean = state["lean"] = Lean(layer)
    if not lean.fits or (plain and lean.variant is not None):
        return None
    return lean if lean.ready(state, dtype, autocast=autocast) else None


def _is_plain(layer: Any, adapter: str) -> bool:
    spec, base = layer.specs[adapter], layer.base_layer
    return (
        layer.site is None
        and isinstance(base, nn.Linear)
        and type(layer.op) is Linear
        and not spec.bias
        and adapter not in layer.tied
        and (not spec.dropout or spec.dropout_position == "pre")
        and _adds_product(type(VARIANTS[spec.variant]))
    )


def _adds_product(variant: type[Variant]) -> bool:
    """Tell whether a variant adds the product of its own factors, whatever it makes of the output then."""
    return all(getattr(variant, name) is getattr(Variant, name) for name in ("add", "in_forward", "plain"))
