"""Twins: one base model adapted twice, by PEFT and by lorica, with the same factors."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica import kernels
from models import randomise

peft = pytest.importorskip("peft", reason="the parity tests compare with PEFT: pip install peft==0.21.2")

Twins = tuple[nn.Module, nn.Module]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PEFT has to say; lorica's own warnings stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected value."""
    scale = expected.detach().double().norm().item()
    return (actual.detach().double() - expected.detach().double()).norm().item() / max(scale, 1e-12)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6, what: str = "tensor") -> None:
    """Equal shapes, and a relative difference within ``tolerance``."""
    assert actual.shape == expected.shape, what
    assert relative(actual, expected) <= tolerance, f"{what}: {relative(actual, expected):.2e} > {tolerance:.0e}"


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """The same keys, shapes and types, and values within ``tolerance`` (0: bitwise)."""
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        if tolerance == 0.0:
            assert torch.equal(actual[name], tensor), name
        else:
            assert_close(actual[name], tensor, tolerance, name)


def adapt(base: nn.Module, fields: dict[str, Any], **arguments: Any) -> Twins:
    """Return ``(theirs, ours)``: two copies of ``base``, adapted with the same config fields."""
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(fields)), **arguments)
    ours = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(**copy.deepcopy(fields)), **arguments)
    return theirs, ours


def add(pair: Twins, name: str, fields: dict[str, Any]) -> None:
    """Add one more adapter to both."""
    with quiet():
        pair[0].add_adapter(name, peft.LoraConfig(**copy.deepcopy(fields)))
    pair[1].add_adapter(name, lorica.LoraConfig(**copy.deepcopy(fields)))


def share_factors(pair: Twins, seed: int = 3) -> None:
    """Randomise PEFT's factors and carry them over through the public state-dict functions."""
    theirs, ours = pair
    randomise(theirs, seed)
    for name in theirs.peft_config:
        with quiet():
            tensors = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        result = lorica.set_peft_model_state_dict(ours, tensors, adapter_name=name)
        assert not result.unexpected_keys


def adapted(base: nn.Module, fields: dict[str, Any], **arguments: Any) -> Twins:
    """:func:`adapt`, with equal random factors."""
    pair = adapt(base, fields, **arguments)
    share_factors(pair)
    return pair


def run(model: nn.Module, batch: Tensor, seed: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients (of every trainable parameter and, where it has one, of the input) of a fixed loss.

    With a seed, dropout draws the masks that peft's draws, which is left to the plain way.
    """
    batch = batch.clone()
    if batch.is_floating_point():
        batch.requires_grad_()
    model.zero_grad(set_to_none=True)
    if seed is not None:
        torch.manual_seed(seed)
    with contextlib.nullcontext() if seed is None else kernels.using("plain"):
        out = model(batch)
    out = out if isinstance(out, Tensor) else out[0]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.float() * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    if batch.grad is not None:
        gradients["input"] = batch.grad
    return out.detach(), gradients


def assert_same_run(pair: Twins, batch: Tensor, tolerance: float = 1e-6, seed: int | None = None) -> None:
    """Equal outputs and gradients."""
    theirs, ours = (run(model, batch, seed) for model in pair)
    assert_close(ours[0], theirs[0], tolerance, "output")
    assert_same_tensors(ours[1], theirs[1], tolerance)


def assert_same_parameters(pair: Twins) -> None:
    """Equal names, shapes, types and trainability of every parameter, and equal counts."""
    theirs, ours = ({n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in pair)
    assert ours == theirs
    assert pair[1].get_nb_trainable_parameters() == pair[0].get_nb_trainable_parameters()


def assert_same_files(pair: Twins, adapter_name: str = "default") -> None:
    """Equal adapter state dicts: keys, shapes, values."""
    with quiet():
        expected = peft.get_peft_model_state_dict(pair[0], adapter_name=adapter_name)
    assert_same_tensors(lorica.get_peft_model_state_dict(pair[1], adapter_name=adapter_name), expected)
