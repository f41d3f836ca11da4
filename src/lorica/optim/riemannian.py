"""Riemannian preconditioning of A's and B's gradients (Zhang & Pilanci 2024, https://arxiv.org/abs/2402.02347).

::

    g_A ← (Bᵀ B + reg·I)⁻¹ g_A          g_B ← g_B (A Aᵀ + reg·I)⁻¹
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.engines.rest import at_rest
from lorica.optim.pairs import Pair, grams, kept, pairs, whole_gradient


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Return an optimiser that takes gradients of A and B in the metric of the product ``B·A``.

    Each step first multiplies the gradients of every pair that trains by two damped ``r × r`` inverses, then steps as
    ``optimizer_cls`` does. What is no pair is updated as ever: factors of embeddings, vectors, whole modules. Each
    expert, and each of several fused projections, has inverses of its own.

    On many ranks the gradients are made whole first. Then each step sends the Gram matrices of factors that are cut,
    ``r²`` numbers a layer in one ``all_reduce`` per axis. What ``fully_shard`` shards is gathered, factor by factor.

    Args:
        model: an adapted model.
        optimizer_cls: torch's, or one like it.
        lr: learning rate.
        reg: damping, added to the diagonal of the Gram matrices.
        kwargs: for ``optimizer_cls``.

    Raises:
        TypeError: ``optimizer_cls`` is no optimiser class.
        ValueError: nothing in the model is a pair that trains, or ``optimizer_cls`` needs a closure.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return preconditioned(optimizer_cls, model, reg=reg)(parameters, lr=lr, **kwargs)


def preconditioned(optimizer_cls: type[Optimizer], model: nn.Module, *, reg: float) -> Callable[..., Optimizer]:
    """Return what makes an ``optimizer_cls`` that preconditions; see :func:`create_riemannian_optimizer`."""
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    found = pairs(model, _trains)
    if not found:
        raise ValueError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model. The "
            "Riemannian preconditioner only applies to LoRA-style adapters."
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} requires a closure and evaluates the model again inside step(), where the "
            "preconditioner would change under it; use one whose closure is optional (SGD, AdamW)"
        )

    def make(params: Any, **options: Any) -> Optimizer:
        kind: Any = _class_for(optimizer_cls)  # type: ignore[arg-type]
        optimizer: Any = kind(params, **options)
        optimizer.lorica_pairs, optimizer.lorica_reg = found, reg
        return optimizer  # type: ignore[no-any-return]

    return make


@functools.cache
def _class_for(optimizer_cls: type[Optimizer]) -> type[Optimizer]:
    class RiemannianPreconditionedOptimizer(optimizer_cls):  # type: ignore[misc,valid-type]
        """``optimizer_cls`` on preconditioned gradients."""

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            """Precondition, then step."""
            if closure is not None:
                raise ValueError(
                    "The Riemannian-preconditioned optimizer does not support closures: one that runs the backward "
                    "pass inside step() would overwrite the preconditioned gradients"
                )
            precondition(self.lorica_pairs, self.lorica_reg)
            return super().step()

    return RiemannianPreconditionedOptimizer


@torch.no_grad()
def precondition(found: list[Pair], reg: float) -> None:
    """Multiply the gradients of pairs by the damped inverses; they have to be whole already.

    All ranks come to the same collectives, whoever of them had no gradient.
    """
    # A's gradient is in the metric of B, and B's in that of A.
    asked = [(pair, of) for pair in found for of in ("a", "b")]
    inverses = [_damped_inverse(gram, reg) for gram in grams([(pair, _other(of)) for pair, of in asked])]
    for (pair, of), inverse in zip(asked, inverses, strict=True):
        parameter = pair.a if of == "a" else pair.b
        gradient = whole_gradient(parameter)
        if gradient is not None:
            assert parameter.grad is not None
            made = pair.apply(of, gradient.to(inverse.dtype), inverse)
            at_rest(parameter.grad).local.copy_(kept(parameter, made))


def _other(of: str) -> str:
    return "b" if of == "a" else "a"


def _damped_inverse(gram: Tensor, reg: float) -> Tensor:
    eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    inverse: Tensor = torch.linalg.pinv(gram + reg * eye)
    return inverse


def _trains(pair: Pair) -> bool:
    return not pair.lookup and pair.a.requires_grad and pair.b.requires_grad and pair.is_product


__all__ = ["create_riemannian_optimizer", "precondition", "preconditioned"]
