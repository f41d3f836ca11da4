"""LoRA+: B learns faster than A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354, section 4)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lorica.adapt.inject import adapter_modules
from lorica.engines.kinds import is_distributed
from lorica.layers import LoraLayer

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


class Kind(NamedTuple):
    """What a parameter that trains is to LoRA+.

    Attributes:
        name: its live name.
        parameter: it.
        fast: B of a product, whose updates A's width does not amplify.
        embedding: a factor of an embedding; its input is one-hot, so that no width amplifies either of them.
    """

    name: str
    parameter: nn.Parameter
    fast: bool
    embedding: bool


def kinds(model: nn.Module) -> Iterator[Kind]:
    """Yield everything that trains, in the model's order."""
    fast: set[int] = set()
    embedding: set[int] = set()
    for _, layer in adapter_modules(model):
        if isinstance(layer, LoraLayer):
            for adapter in layer.specs:
                if adapter not in layer.tied:
                    factors = layer.factors(adapter)
                    if layer.op.lookup:
                        embedding |= {id(factors.a), id(factors.b)}
                    else:
                        fast |= {id(factors.b), id(factors.bias)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield Kind(name, parameter, id(parameter) in fast, id(parameter) in embedding)


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Return an optimiser with a learning rate of its own for B.

    Four parameter groups, in PEFT's order: A and other matrices, factors of embeddings, B and vectors with weight
    decay, B and vectors without. Where some parameters are distributed tensors, each group is two.

    Args:
        model: an adapted model.
        optimizer_cls: torch's, or one like it, also bitsandbytes' 8-bit ones.
        lr: learning rate of A.
        loraplus_lr_ratio: B's as a multiple of it; at least 1.
        kwargs: ``loraplus_weight_decay`` (0), ``loraplus_lr_embedding`` (1e-6), and arguments of ``optimizer_cls``.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    slow = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, "lr": lr},
        {"params": [], "weight_decay": decay, "lr": slow},
        {"params": [], "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    spared = _in_norms(model)
    for kind in kinds(model):
        decays = "bias" not in kind.name and id(kind.parameter) not in spared
        vector = kind.fast or kind.parameter.ndim == 1
        place = 1 if kind.embedding else 0 if not vector else 2 if decays else 3
        groups[place]["params"].append(kind.parameter)
    make: Any = optimizer_cls
    optimizer: Optimizer = make(_apart(groups), lr=lr, **kwargs)
    if optimizer_cls.__name__ in _EIGHT_BIT:
        manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _in_norms(model: nn.Module) -> set[int]:
    norms = (module for module in model.modules() if isinstance(module, nn.LayerNorm))
    return {id(parameter) for module in norms for parameter in module.parameters()}


def _apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split groups in which plain and distributed parameters stand together, which no kernel takes."""
    found = []
    for group in groups:
        cut = [parameter for parameter in group["params"] if is_distributed(parameter)]
        plain = [parameter for parameter in group["params"] if not is_distributed(parameter)]
        found.append({**group, "params": plain or cut})
        if plain and cut:
            found.append({**group, "params": cut})
    return found


__all__ = ["Kind", "create_loraplus_optimizer", "kinds"]
