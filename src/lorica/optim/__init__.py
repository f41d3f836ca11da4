"""Optimisers that know that a delta is a product (rates of their own for A and B, gradients in its metric), and of many
small factors (one call for all of them)."""

from lorica.optim.adamw import AdamW
from lorica.optim.lorafa import LoraFAOptimizer, create_lorafa_optimizer, freeze_one
from lorica.optim.loraplus import Kind, create_loraplus_optimizer, kinds
from lorica.optim.pairs import Pair, pairs
from lorica.optim.riemannian import create_riemannian_optimizer, preconditioned

__all__ = [
    "AdamW",
    "Kind",
    "LoraFAOptimizer",
    "Pair",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "freeze_one",
    "kinds",
    "pairs",
    "preconditioned",
]
