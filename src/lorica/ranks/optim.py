"""Optimisers and gradient scalers over parameters of which some are plain and some are distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt.inject import base_of
from lorica.engines import Engines
from lorica.engines.kinds import is_distributed
from lorica.ranks.gradients import sum_gradients


def parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Return what trains in parameter groups that an optimiser can take whole, foreach and fused.

    An optimiser's kernels take lists of tensors, which must be all plain or all distributed over one mesh; it works
    group by group. Where everything is of one kind there is one group.

    Args:
        model: the adapted model.
        options: of every group, such as ``lr`` and ``weight_decay``.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = parameter.device_mesh if is_distributed(parameter) else None
            groups.setdefault(kind, []).append(parameter)
    return [{"params": parameters, **options} for parameters in groups.values()]


class GradScaler(torch.amp.GradScaler):
    """torch's gradient scaler for a model that lies over ranks: they all step, or none does.

    Gradients are made whole before they are looked at, and an overflow on one rank counts on all of them: shards
    overflow one by one, and a rank that stepped alone would be another model.

    Args:
        model: the adapted model.
        device: the kind of device, as torch's; None: the model's.
        options: torch's other arguments.
    """

    def __init__(self, model: nn.Module, device: str | None = None, **options: Any) -> None:
        super().__init__(next(model.parameters()).device.type if device is None else device, **options)
        self._model = model

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        sum_gradients(self._model)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        local: Any = SimpleNamespace(param_groups=[{"params": [_local(p) for p in parameters if p.grad is not None]}])
        found: dict[torch.device, Tensor] = super()._unscale_grads_(local, inv_scale, found_inf, allow_fp16)
        found = found or {inv_scale.device: found_inf}
        for axis in Engines(base_of(self._model)).axes.values():
            for flag in found.values():
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=axis.group)
        return found


def _local(parameter: nn.Parameter) -> nn.Parameter:
    """Return a plain parameter whose gradient shares the memory of this rank's part of a distributed one's."""
    if not is_distributed(parameter):
        return parameter
    values: Any = parameter.detach()
    plain = nn.Parameter(values.to_local())
    gradient = parameter.grad
    plain.grad = gradient.to_local() if is_distributed(gradient) else gradient
    return plain
