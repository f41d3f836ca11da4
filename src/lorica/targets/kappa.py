"""Targets by condition number: layers whose weight loses no direction forget least (KappaTune, arXiv:2506.16289).

``κ = σ_max / σ_min``. The singular values come from the Gram matrix of the shorter side, in float64; where a small one
would drown in the squares, from the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorica.engines import Engines
from lorica.engines.gather import gather_parameter
from lorica.ops import op_of
from lorica.storage import Packed, stored_weight
from lorica.targets.walk import bare, base_modules

#: Below this ratio of the smallest singular value to the largest, squares have lost the smallest.
_SQUARES_LOSE = 1e-5
_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def condition_number(weight: Tensor) -> float:
    """Return ``σ_max / (σ_min + 1e-8)`` of a matrix (a kernel counts as ``[out, rest]``)."""
    matrix = weight.detach().flatten(1).to(torch.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    smallest, largest = float(squares[0].sqrt()), float(squares[-1].sqrt())
    if smallest < _SQUARES_LOSE * largest:
        smallest = float(torch.linalg.svdvals(matrix)[-1])
    return largest / (smallest + 1e-8)


class KappaTuneSelector:
    """Ranks a model's linear layers and stacks of experts by condition number, the best conditioned first.

    On a model that lies over ranks the logical weights are looked at, one at a time; all ranks call.

    Args:
        model: the base model, adapted or not.
        max_dim_size_to_analyze: layers with a longer side are left out.
        moe_param_suffixes: endings of the names of stacked experts' weights; None: the usual ones.
        show_progress: show bars.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or _EXPERTS
        self.show_progress = show_progress
        self._modules: dict[str, float] | None = None
        self._parameters: dict[str, float] = {}

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return names of linear layers for ``target_modules``.

        Args:
            top_p: the share of the layers to take, at least one.
            num_modules: how many to take, instead.
            threshold: the largest condition number, if neither is given.
        """
        self._compute()
        return _best(self._modules or {}, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return names of stacked experts' weights for ``target_parameters``; for the arguments see above."""
        self._compute()
        return _best(self._parameters, top_p, num_modules, threshold)

    @torch.no_grad()
    def _compute(self) -> None:
        if self._modules is not None:
            return
        engines = Engines(self.model)
        found: dict[str, float] = {}
        modules = [(name, bare(module)) for name, module in base_modules(self.model)]
        linears = [(name, module) for name, module in modules if getattr(op_of(module), "kind", None) == "Linear"]
        for name, module in tqdm(linears, desc="Condition numbers (linear layers)", disable=not self.show_progress):
            weight = _weight_of(name, module, engines)
            if max(weight.shape) <= self.max_dim_size_to_analyze:
                found[name] = condition_number(weight)
        self._modules = found
        stacks = list(self._stacks())
        for name, owner, leaf in tqdm(stacks, desc="Condition numbers (experts)", disable=not self.show_progress):
            site = engines.parameter_site(name, owner, leaf, ("expert", "out", "in"))
            parameter = getattr(owner, leaf).detach()
            stack = parameter if site is None else gather_parameter(parameter, site, ("expert", "out", "in"))
            if max(stack.shape[1:]) <= self.max_dim_size_to_analyze:
                self._parameters[name] = sum(map(condition_number, stack)) / len(stack)

    def _stacks(self) -> Iterator[tuple[str, nn.Module, str]]:
        for path, found in base_modules(self.model):
            module = bare(found)
            for leaf, parameter in module._parameters.items():
                name = f"{path}.{leaf}"
                if parameter is not None and parameter.dim() == 3 and name.endswith(self.moe_param_suffixes):
                    yield name, module, leaf


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return ``target_modules`` and ``target_parameters`` (None where there are no stacked experts), best conditioned.

    Args:
        model: the base model.
        top_p: the share of each kind to take.
        max_dim_size_to_analyze: layers with a longer side are left out.
        moe_param_suffixes: endings of the names of stacked experts' weights; None: the usual ones.
        show_progress: show bars.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p=top_p)
    return {"target_modules": selector.get_best_targets(top_p=top_p), "target_parameters": parameters or None}


def _weight_of(name: str, module: nn.Module, engines: Engines) -> Tensor:
    op = op_of(module)
    assert op is not None
    stored = stored_weight(module, op.weight_name)
    if isinstance(stored, Packed):
        return stored.dequantize()
    site = op.place(engines, name, module)
    return stored.detach() if site is None else gather_parameter(stored.detach(), site, op.roles_weight)


def _best(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    names: Sequence[str] = sorted(numbers, key=lambda name: numbers[name])
    if num_modules is not None:
        return list(names[:num_modules])
    if top_p is not None:
        return list(names[: max(1, int(len(names) * top_p))]) if names else []
    return [name for name in names if threshold is None or numbers[name] <= threshold]


__all__ = ["KappaTuneSelector", "condition_number", "find_kappa_target_modules"]
