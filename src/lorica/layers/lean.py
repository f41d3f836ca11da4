"""The short way through an adapted linear layer: one kernel for the base product and the delta.

It is taken where nothing comes in between: a dense ``nn.Linear`` that is whole and has no hooks, one running adapter
that is plain LoRA, an eager forward. Everything else goes through :meth:`lorica.ops.Op.forward`, which the short way
must equal. What it needs is looked up once and kept; each forward asks only what may have changed since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from lorica.config.spec import AdapterSpec
from lorica.kernels import Dropped, Projection, asked, draw_seed, kernel_for
from lorica.ops.linear import Linear
from lorica.variants import VARIANTS, Variant

_has_global_hooks: Callable[[], bool] = torch_modules._has_any_global_hook


class Lean:
    """What the short way needs of one layer.

    Args:
        layer: the adapted layer.

    Attributes:
        active: the switch's active adapters when this was looked up; others need another look.
        fits: whether the short way can be taken with these.
    """

    __slots__ = ("active", "adapter", "base", "fits", "hooks", "own", "parameters", "spec", "tensors")

    def __init__(self, layer: Any) -> None:
        self.active: tuple[str, ...] = layer.switch.active
        names = [name for name in self.active if name in layer.specs]
        self.fits = len(names) == 1 and _is_plain(layer, names[0])
        if not self.fits:
            return
        base: nn.Module = layer.base_layer
        self.adapter = names[0]
        self.spec: AdapterSpec = layer.specs[self.adapter]
        self.base = base
        self.own = base.__dict__
        self.parameters = base._parameters
        self.hooks = (base._forward_pre_hooks, base._forward_hooks, base._backward_pre_hooks, base._backward_hooks)
        first, second = layer._containers()
        self.tensors = (first[self.adapter]._parameters, second[self.adapter]._parameters)

    def __deepcopy__(self, memo: Any) -> None:
        """Return nothing: a copied layer looks for itself."""

    def __reduce__(self) -> Any:
        return (type(None), ())

    def projection(self, state: dict[str, Any], dtype: torch.dtype, *, autocast: bool) -> Projection | None:
        """Return the layer in plain tensors; None where the short way cannot be taken now.

        Args:
            state: the layer's ``__dict__``.
            dtype: of the input.
            autocast: whether weights of another dtype follow it.
        """
        base, spec = self.base, self.spec
        weight: Any = self.parameters.get("weight")
        bias: Any = self.parameters.get("bias")
        before, after, backward_before, backward_after = self.hooks
        if (
            state["merged_adapters"]
            or state["specs"].get(self.adapter) is not spec
            or state["_modules"].get("base_layer") is not base
            or before
            or after
            or backward_before
            or backward_after
            or "forward" in self.own
            or not _is_frozen(weight, dtype, autocast)
            or not (bias is None or _is_frozen(bias, dtype, autocast))
        ):
            return None
        first, second = self.tensors
        dropped = Dropped(spec.dropout, draw_seed()) if spec.dropout and state["training"] else None
        return Projection(weight, bias, first["weight"], second["weight"], spec.scaling, dropped)


def _is_frozen(tensor: Any, dtype: torch.dtype, autocast: bool) -> bool:
    return type(tensor) is nn.Parameter and not tensor.requires_grad and (autocast or tensor.dtype == dtype)


def forward(layer: Any, x: Any) -> Tensor | None:
    """Return the layer's output for the input ``x``; None where the short way cannot be taken."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or asked() == "plain":
        return None
    state = layer.__dict__
    switch, lean = state["switch"], state["lean"]
    if lean is None or lean.active is not switch.active:
        lean = state["lean"] = Lean(layer)
    if not lean.fits or not switch.enabled or switch.rows is not None or _has_global_hooks():
        return None
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return _run(layer, lean, x, autocast=False)
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _run(layer, lean, x, autocast=True)


def _run(layer: Any, lean: Lean, x: Tensor, *, autocast: bool) -> Tensor | None:
    projection = lean.projection(layer.__dict__, x.dtype, autocast=autocast)
    if projection is None:
        return None
    output: Tensor = kernel_for("projection", x, projection)(x, projection)
    return output


def _is_plain(layer: Any, adapter: str) -> bool:
    spec, base = layer.specs[adapter], layer.base_layer
    return (
        layer.site is None
        and isinstance(base, nn.Linear)
        and type(base).forward is nn.Linear.forward
        and type(layer.op) is Linear
        and not spec.bias
        and adapter not in layer.tied
        and (not spec.dropout or spec.dropout_position == "pre")
        and type(VARIANTS[spec.variant]) is Variant
    )
