"""The optimiser's parameter groups and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorica.optim import AdamW, LoraFAOptimizer, freeze_one, kinds, preconditioned
from lorica.train.recipe import TrainingSection

#: Of the Gram matrices of Riemannian preconditioning, PEFT's.
DAMPING = 1e-2


def groups(model: nn.Module, settings: TrainingSection) -> list[dict[str, Any]]:
    """Parameter groups: LoRA+ (arXiv:2402.12354, section 4) learning rates; weight decay on matrices only."""
    ratio = settings.loraplus_lr_ratio or 1.0
    found: dict[tuple[float, float, bool], list[tuple[str, nn.Parameter]]] = {}
    for kind in kinds(model):
        rate = settings.learning_rate * (ratio if kind.fast or kind.embedding else 1.0)
        decay = settings.weight_decay if kind.parameter.ndim > 1 else 0.0
        # One kernel steps either plain tensors or distributed ones.
        key = (rate, decay, hasattr(kind.parameter, "placements"))
        found.setdefault(key, []).append((kind.name, kind.parameter))
    return [
        {"params": [p for _, p in named], "names": [n for n, _ in named], "lr": rate, "weight_decay": decay}
        for (rate, decay, _), named in found.items()
    ]


def optimizer(model: nn.Module, settings: TrainingSection) -> Optimizer:
    """The recipe's optimiser over the trainable parameters: AdamW, in one fused kernel where the devices have it."""
    options: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps}
    if settings.optimizer == "lora_fa":
        projected = freeze_one(model)
        return LoraFAOptimizer(groups(model, settings), projected=projected, **options)
    make = AdamW if settings.optimizer == "adamw" else preconditioned(AdamW, model, reg=DAMPING)
    return make(groups(model, settings), **options)


def warmup(settings: TrainingSection, steps: int) -> int:
    """Steps of warm-up in a run of ``steps``."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return round(settings.warmup_ratio * steps)


def multiplier(settings: TrainingSection, steps: int) -> Callable[[int], float]:
    """The learning rate of step ``i`` (from 0), as a multiple of its highest value.

    It rises linearly to 1 at step ``warmup - 1``, then falls along half a cosine or a line, or stays. The last step,
    ``steps - 1``, is still above ``min_lr_ratio``, which is reached at ``steps``: no step is without effect.
    """
    rise, floor = warmup(settings, steps), settings.min_lr_ratio

    def at(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = min(1.0, (step - rise) / max(1, steps - rise))
        fall = {"constant": 0.0, "linear": done, "cosine": 0.5 * (1 - math.cos(math.pi * done))}[settings.schedule]
        return 1.0 - (1.0 - floor) * fall

    return at


def schedule(optimiser: Optimizer, settings: TrainingSection, steps: int) -> LambdaLR:
    """The scheduler of a run of ``steps`` optimiser steps."""
    return LambdaLR(optimiser, multiplier(settings, steps))


def resume(scheduler: LambdaLR, step: int) -> None:
    """Set scheduler and optimiser to where they stand after ``step`` steps, in groups however divided."""
    rates = [base * at(step) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state = scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict(state)
