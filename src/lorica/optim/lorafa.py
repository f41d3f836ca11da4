"""LoRA-FA: A is frozen and B's gradient projected, so that few activations are kept (https://arxiv.org/abs/2308.03303).

::

    g_B ← s⁻²·g_B (A Aᵀ)⁻¹        which brings s·B·A as near as B alone can to a step on the full weight
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.engines.rest import at_rest
from lorica.optim.pairs import Pair, grams, kept, pairs, whole_gradient

#: Keeps the inverse finite where a factor has fewer directions than its rank.
DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, as transformers had it, on B's projected gradients.

    Moments are kept in float32 for 16-bit parameters. The inverses are computed once and again when a frozen factor
    was written to.

    On many ranks the first step sends the Gram matrices of frozen factors that are cut, ``r²`` numbers a layer in one
    ``all_reduce`` per axis; what ``fully_shard`` shards is gathered. Later steps send nothing of their own, but for
    projected factors that are sharded by their rank.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, after the step.
        correct_bias: whether the moments' bias towards zero is corrected.
        projected: pairs of which one factor is frozen.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        projected: Iterable[Pair] = (),
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self._projected = [(pair, _frozen_side(pair)) for pair in projected]
        self._inverses: tuple[tuple[int, ...], list[Tensor]] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; gradients that are shares of sums over ranks were made whole before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        projections = self._projections()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, projections.get(id(parameter)))
        return loss

    def _projections(self) -> dict[int, tuple[Pair, str, Tensor]]:
        """Return the trained factor's id → its pair, its side and ``(s²·G)⁻¹``."""
        frozen = [pair.a if of == "a" else pair.b for pair, of in self._projected]
        state = tuple(tensor._version for tensor in frozen)
        if self._inverses is None or self._inverses[0] != state:
            self._inverses = (state, [_inverse(gram) for gram in grams(self._projected)])
        found = {}
        for (pair, of), inverse in zip(self._projected, self._inverses[1], strict=True):
            side, trained = ("b", pair.b) if of == "a" else ("a", pair.a)
            found[id(trained)] = (pair, side, inverse / pair.scaling**2)
        return found

    def _update(
        self, parameter: nn.Parameter, group: dict[str, Any], projection: tuple[Pair, str, Tensor] | None
    ) -> None:
        state = self.state[parameter]
        if not state:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
        mean, square = at_rest(state["exp_avg"]).local, at_rest(state["exp_avg_sq"]).local
        gradient = _gradient(parameter, projection).to(mean.dtype)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        steps, size = int(state["step"]), group["lr"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        local = at_rest(parameter.data).local
        made = local.to(mean.dtype).addcdiv(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            made *= 1 - group["lr"] * group["weight_decay"]
        local.copy_(made)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; moments keep the dtype they were saved in, where torch would round them to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != "step":
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    self.state[parameter][name] = value.to(parameter.device, wide, copy=True)


def _gradient(parameter: nn.Parameter, projection: tuple[Pair, str, Tensor] | None) -> Tensor:
    assert parameter.grad is not None
    if projection is None:
        return at_rest(parameter.grad).local
    pair, side, inverse = projection
    # The rows of B's gradient are multiplied one by one, so those that are at rest here are enough.
    if side == "b" and len(inverse) == 1:
        return pair.apply(side, at_rest(parameter.grad).local.to(inverse.dtype), inverse)
    whole = whole_gradient(parameter)
    assert whole is not None
    return kept(parameter, pair.apply(side, whole.to(inverse.dtype), inverse))


def _inverse(gram: Tensor) -> Tensor:
    eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    inverse: Tensor = torch.linalg.pinv(gram + DAMPING * eye)
    return inverse


def _frozen_side(pair: Pair) -> str:
    """Return which factor is frozen: the one that starts at random, A, and B of an embedding."""
    return "b" if pair.lookup else "a"


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze one factor of every pair and return the optimiser of the rest.

    A is frozen, which starts at random; of an embedding it is B. Every pair's own scale is used, so ``r`` and
    ``lora_alpha`` are not needed; they are there for PEFT's callers.

    Args:
        model: an adapted model; what is frozen, is so from now on.
        r: not used.
        lora_alpha: not used.
        lr: learning rate.
        weight_decay: AdamW's.
        use_rslora: must be what the configurations of the active adapters say; deprecated.

    Raises:
        ValueError: ``use_rslora`` contradicts the configurations.
    """
    if use_rslora is not None:
        _check_rslora(model, use_rslora)
    projected = freeze_one(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LoraFAOptimizer(trained, lr=lr, weight_decay=weight_decay, projected=projected)


def freeze_one(model: nn.Module) -> list[Pair]:
    """Freeze the factor of every pair that starts at random; return the pairs whose other one trains."""
    found = pairs(model)
    for pair in found:
        (pair.b if pair.lookup else pair.a).requires_grad_(False)
    return [pair for pair in found if (pair.a if pair.lookup else pair.b).requires_grad and pair.is_product]


def _check_rslora(model: Any, use_rslora: bool) -> None:
    configs = getattr(model, "peft_config", {})
    active = [name for name in getattr(model, "active_adapters", ()) if name in configs]
    wrong = [name for name in active if bool(configs[name].use_rslora) != use_rslora]
    if wrong:
        raise ValueError(
            f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the following active adapters have "
            f"`use_rslora` set differently in the model config: {wrong}. Please configure rsLoRA via LoraConfig"
        )
    warnings.warn(
        "`use_rslora` in create_lorafa_optimizer is deprecated. Please configure rsLoRA via LoraConfig instead.",
        FutureWarning,
        stacklevel=3,
    )


__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "freeze_one"]
