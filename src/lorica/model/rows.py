"""The outermost call of a batch whose rows have adapters of their own, or see theirs from some token on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapt import inject
from lorica.errors import AdapterError, suggest
from lorica.layers import Switch
from lorica.routing import BASE, Rows, last_occurrence

#: What :func:`rows_of_call` takes out of the arguments of a forward or of ``generate``.
ARGUMENTS = frozenset(("adapter_names", "alora_offsets"))
#: Arguments that have the rows of a batch in their first dimension; those that come first are asked first.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "pixel_values")

Offsets = Sequence[int | None] | Tensor


@contextmanager
def route_rows(
    model: nn.Module,
    adapter_names: Sequence[str] | None = None,
    *,
    input_ids: Tensor | None = None,
    alora_offsets: Offsets | None = None,
) -> Iterator[None]:
    """Give each row of the batches inside a ``with`` block an adapter of its own.

    For a model that was adapted without a wrapper, whose forward knows no ``adapter_names``; and for several forwards
    of one batch, which then share what is worked out for its rows: where they are, where an invocation stands, and
    stacked copies of the factors of the adapters that are named. So no factor is to be changed inside; other threads
    that would change adapters wait (see :func:`hold_adapters`).

    Args:
        model: an adapted model, with or without a wrapper.
        adapter_names: an adapter for each row, ``"__base__"`` for none; None: the active ones in all rows.
        input_ids: the prompts, ``[rows, length]``, in which activated adapters look for their invocation.
        alora_offsets: what they would find there, in its place: for each row the number of tokens that its adapter
            sees, counted from the end.

    Raises:
        AdapterError: the model has no adapters, one that is named does not exist, or the model trains.
    """
    switch = inject.switch_of(model)
    if switch is None:
        raise AdapterError("route_rows: the model has no adapters; put one in with get_peft_model")
    configs = getattr(inject.base_of(model), "peft_config", {})
    with switch.turns.holding():
        rows = _made(model, switch, configs, adapter_names, alora_offsets, input_ids, lasting=True)
        with _routed(model, switch, rows):
            yield


def has_rows(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a ``LoraModel`` concerns rows: it names adapters, or an active one is activated by tokens.

    Raises:
        AdapterError: a block of ``route_rows`` is around a forward of ``nn.DataParallel``.
    """
    if not ARGUMENTS.isdisjoint(kwargs):
        return True
    switch: Switch = model.switch
    if "_is_replica" in model.__dict__ and switch.routing and switch.rows is None:
        raise AdapterError(
            "route_rows does not reach the threads of nn.DataParallel, each of which has a part of the batch; run the "
            "model itself"
        )
    return switch.rows is None and switch.enabled and bool(_activated(model.peft_config, switch.active))


@contextmanager
def rows_of_call(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, generates: bool = False
) -> Iterator[dict[str, Any]]:
    """Give the rows of one call their adapters; yield the keyword arguments that are left for the base model.

    Args:
        model: a ``LoraModel``.
        args: of the call.
        kwargs: of the call.
        generates: whether it is ``generate`` that is called.

    Raises:
        AdapterError: there are not as many rows as names, an adapter does not exist, the model trains, or an adapter
            that tokens activate is to search with beams.
    """
    left = {name: value for name, value in kwargs.items() if name not in ARGUMENTS}
    names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
    switch: Switch = model.switch
    if not switch.enabled:
        yield left
        return
    inputs = _inputs(args, left)
    if names is not None and inputs is not None and inputs.dim() > 1 and len(inputs) != len(names):
        raise AdapterError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(inputs)} respectively."
        )
    activated = _activated(model.peft_config, switch.active if names is None else names)
    if activated and generates and _beams(left) > 1:
        raise AdapterError("Beam search not yet supported for aLoRA.")
    ids = inputs if inputs is not None and not inputs.is_floating_point() else None
    if activated and offsets is None and ids is None:
        what = (
            "during generate as input_ids are not available. Disabling aLoRA."
            if generates
            else "when only inputs_embeds are provided. Disabling aLoRA for this forward pass."
        )
        warnings.warn(f"Cannot calculate aLoRA offsets {what}", stacklevel=5)
    rows = _made(model, switch, model.peft_config, names, offsets, ids, lasting=generates)
    with _routed(model, switch, rows):
        yield left


def _made(
    model: nn.Module,
    switch: Switch,
    configs: Mapping[str, Any],
    names: Sequence[str] | None,
    offsets: Offsets | None,
    ids: Tensor | None,
    *,
    lasting: bool,
) -> Rows:
    """Return the rows of a batch."""
    if names is not None:
        _check(model, configs, names)
    activated = _activated(configs, switch.active if names is None else names)
    found = {name: _offsets(tokens, offsets, ids) for name, tokens in activated.items()}
    return Rows(names, found, lasting=lasting)


def _check(model: nn.Module, configs: Mapping[str, Any], names: Sequence[str]) -> None:
    if not isinstance(names, list | tuple):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    if model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted({name for name in names if name != BASE and name not in configs})
    if unknown:
        raise AdapterError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}{suggest(unknown[0], configs)}"
        )


def _activated(configs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Sequence[int]]:
    """Return those adapters of ``names`` that tokens activate, and which."""
    found = {name: getattr(configs.get(name), "alora_invocation_tokens", None) for name in dict.fromkeys(names)}
    return {name: tokens for name, tokens in found.items() if tokens}


def _offsets(tokens: Sequence[int], given: Offsets | None, ids: Tensor | None) -> Tensor:
    if isinstance(given, Tensor):
        return given
    if given is not None:
        return torch.tensor([offset or 0 for offset in given], dtype=torch.long)
    if ids is None:
        return torch.zeros(1, dtype=torch.long)  # for any number of rows
    return last_occurrence(ids.unsqueeze(0) if ids.dim() == 1 else ids, tokens)


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor whose rows are those of the batch: the first that was given."""
    named = (kwargs.get(name) for name in _INPUTS)
    return next((value for value in (*args, *named, *kwargs.values()) if isinstance(value, Tensor)), None)


def _beams(kwargs: Mapping[str, Any]) -> int:
    beams = kwargs.get("num_beams", getattr(kwargs.get("generation_config"), "num_beams", None))
    return beams if isinstance(beams, int) else 1


@contextmanager
def _routed(model: nn.Module, switch: Switch, rows: Rows) -> Iterator[None]:
    """Let the layers know the rows, also when activation checkpointing runs some of them again in a backward pass."""
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    try:
        if rows.offsets and model.training:
            for module in model.modules():
                if callable(checkpoint := module.__dict__.get(_CHECKPOINT)):
                    replaced.append((module, checkpoint))
                    setattr(module, _CHECKPOINT, partial(_checkpoint, checkpoint, switch, rows))
        with switch.routed(rows):
            yield
    finally:
        for module, checkpoint in replaced:
            setattr(module, _CHECKPOINT, checkpoint)


#: Where a layer of transformers keeps the function that checkpoints it.
_CHECKPOINT = "_gradient_checkpointing_func"


def _checkpoint(
    checkpoint: Callable[..., Any], switch: Switch, rows: Rows, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Checkpoint a function that knows the rows, whenever it is run."""

    def knowing(*args: Any, **kwargs: Any) -> Any:
        with switch.routed(rows):
            return function(*args, **kwargs)

    return checkpoint(knowing, *args, **kwargs)


__all__ = ["ARGUMENTS", "has_rows", "route_rows", "rows_of_call"]
