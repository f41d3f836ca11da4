"""A model adapted by both libraries with equal factors, and what is measured of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import lorica
from lorica.bench.contest import FROZEN, LORICA, PEFT, quiet
from lorica.bench.timing import Task

Call = Callable[[nn.Module, Tensor], Tensor]


def has_peft() -> bool:
    """Whether PEFT is installed, to be compared with."""
    return find_spec("peft") is not None


def library(side: str) -> Any:
    """Return the library of a side.

    Raises:
        ImportError: it is peft, and not installed.
    """
    if side == LORICA:
        return lorica
    import peft

    return peft


def config(side: str, **fields: Any) -> Any:
    """Return one library's ``LoraConfig``: rank 16 on every linear, unless told otherwise."""
    return library(side).LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **fields})


def adapt(side: str, base: nn.Module, **fields: Any) -> nn.Module:
    """Return ``base`` adapted in place by one library."""
    with quiet():
        model: nn.Module = library(side).get_peft_model(base, config(side, **fields))
    return model


def adapted(
    base: nn.Module,
    *,
    libraries: Sequence[str] = (PEFT, LORICA),
    copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    **fields: Any,
) -> dict[str, nn.Module]:
    """Return copies of ``base`` adapted by the libraries with the same random factors (neither is zero).

    Args:
        base: stays as it is.
        libraries: the sides.
        copied: makes the copies; see :func:`twin`.
        **fields: of the config.
    """
    models = {side: adapt(side, copied(base), init_lora_weights=False, **fields) for side in libraries}
    if PEFT in models:
        with quiet():
            state = library(PEFT).get_peft_model_state_dict(models[PEFT])
            lorica.set_peft_model_state_dict(models[LORICA], state)
    return models


def twin(base: nn.Module) -> nn.Module:
    """Return a copy of a model that holds the same parameters and buffers, so that they are in memory once.

    What changes them, such as merging, changes them for both.
    """
    held = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in held})


def with_frozen(base: nn.Module, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the models and, as one more side, the base model itself with nothing to train."""
    return {FROZEN: base.requires_grad_(False), **models}


def step(model: nn.Module, call: Call, x: Tensor) -> Task:
    """Forward and backward of ``model`` for the input ``x``.

    The input requires a gradient on every side, so that backward runs through the whole frozen base too.
    """
    gradient = torch.ones_like(call(model, x)).div_(x.numel())

    def run() -> Tensor:
        y = call(model, x.detach().requires_grad_())
        y.backward(gradient)  # type: ignore[no-untyped-call]
        return y.detach()

    return Task(run, reset=lambda: model.zero_grad(set_to_none=True))


def forward(model: nn.Module, call: Call, x: Tensor) -> Task:
    """Forward without autograd."""
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return call(model, x)

    return Task(run)
