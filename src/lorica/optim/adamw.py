"""torch's AdamW, where a step over hundreds of small factors costs two kernels and hardly any Python.

torch's own step looks each parameter's state up, sorts the tensors by device and dtype, and counts every parameter's
steps with a kernel of its own, each time anew; for small factors that takes longer than the arithmetic. Here the lists
are made once. The arithmetic is one call of torch's fused kernel, so that every number is bit for bit what
``torch.optim.AdamW(fused=True)`` gives.

One flat buffer instead, of which factors and moments are views, was measured and is no faster: gradients come from
autograd as tensors of their own, and copying them together costs more than the kernel gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


class _Lists(NamedTuple):
    """What a step over one group needs, in one order.

    Attributes:
        params: parameters that have a gradient.
        states: the state of each.
        steps: their counts of steps, views of ``counter``.
        counter: ``[len(params)]``.
    """

    params: list[Tensor]
    states: list[dict[str, Tensor]]
    steps: list[Tensor]
    counter: Tensor

    def of(self, name: str) -> list[Tensor]:
        """Return one tensor of every state, as it is now."""
        return [state[name] for state in self.states]


class AdamW(torch.optim.AdamW):
    """AdamW (https://arxiv.org/abs/1711.05101) with a short way for many small parameters on a CPU.

    It is a ``torch.optim.AdamW``: same arguments, groups, state and checkpoints, which either loads from the other. The
    fused kernel is the default, where the devices have it. torch's own step is taken wherever the short way does not
    go: on accelerators; for parameters that are distributed, complex or not contiguous; with a gradient scaler, rates
    that are tensors, ``foreach``, ``capturable`` or ``differentiable``; and in a compiled step.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        amsgrad: use the largest second moment so far.
        options: ``maximize``, ``foreach``, ``capturable``, ``differentiable``, ``fused``, as torch has them.

    Raises:
        RuntimeError: a gradient is sparse (in the step), or ``fused=True`` is asked for where there is no such kernel.
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        params = [_whole_group(item) for item in params]
        if not any(options.get(way) for way in ("fused", "foreach", "capturable", "differentiable")):
            options.setdefault("fused", _can_fuse(params) or None)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Forget the lists, which are of the state that was; copying, unpickling and loading come here."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def _forget(self) -> None:
        self._lists: dict[int, _Lists] = {}
        self._known: list[Any] = []  # the states that the lists were made from

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss and its gradients anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            work = self._work()
            for group, lists, grads in work or ():
                _update(group, lists, grads)
        if work is None:
            _own_step()(self)
        return loss

    def _work(self) -> list[tuple[dict[str, Any], _Lists, list[Tensor]]] | None:
        """Return each group with its lists and gradients; None: this step is not one for the short way."""
        if torch.compiler.is_compiling() or getattr(self, "grad_scale", None) is not None:
            return None
        if getattr(self, "found_inf", None) is not None or not all(map(_is_plain, self.param_groups)):
            return None
        if not _same(list(self.state.values()), self._known):
            self._forget()
        work = []
        for index, group in enumerate(self.param_groups):
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                lists = self._lists.get(index)
                if lists is None or not _same(params, lists.params) or not _same(lists.of("step"), lists.steps):
                    lists = self._listed(index, group)
                    if lists is None:
                        return None
                grads = [parameter.grad for parameter in params]
                if not all(grad.layout is torch.strided for grad in grads):
                    return None
                # The kernel goes through memory; a gradient with other strides would meet the wrong numbers.
                work.append((group, lists, [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]))
        return work

    def _listed(self, index: int, group: dict[str, Any]) -> _Lists | None:
        """Make a group's lists, and the state of parameters that have none; None: something in it is not plain."""
        params: list[Tensor] = []
        moments: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, [], moments, moments, moments, steps)  # type: ignore[no-untyped-call]
        usual = all(type(parameter) in (Tensor, nn.Parameter) for parameter in params)
        if not usual or not all(map(_is_usual, params + moments)) or any(one.dtype != torch.float32 for one in steps):
            return None
        states: list[Any] = [self.state[parameter] for parameter in params]
        counter = torch.stack(steps)
        lists = self._lists[index] = _Lists(params, states, list(counter.unbind()), counter)
        for state, step in zip(states, lists.steps, strict=True):
            state["step"] = step
        self._known = list(self.state.values())
        return lists


def _update(group: dict[str, Any], lists: _Lists, grads: list[Tensor]) -> None:
    lists.counter.add_(1)
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        lists.params,
        grads,
        lists.of("exp_avg"),
        lists.of("exp_avg_sq"),
        lists.of("max_exp_avg_sq") if group["amsgrad"] else [],
        lists.steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )


def _own_step() -> Callable[[torch.optim.AdamW], object]:
    """Return torch's step without the wrapper that calls hooks, which has done so for the step it is part of."""
    step: Any = torch.optim.AdamW.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _is_plain(group: dict[str, Any]) -> bool:
    asked = group["foreach"] or group["capturable"] or group["differentiable"] or group["fused"] is False
    numbers = (group["lr"], group["weight_decay"], *group["betas"])
    return not asked and not any(isinstance(number, Tensor) for number in numbers)


def _is_usual(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.is_contiguous()


def _whole_group(item: Any) -> Any:
    """Return a parameter, or a group whose parameters can be gone through twice."""
    if isinstance(item, dict) and isinstance(item.get("params"), Iterator):
        return {**item, "params": list(item["params"])}
    return item


def _can_fuse(params: Sequence[Any]) -> bool:
    """Whether torch has the fused kernel for all of these parameters, groups or named parameters."""
    groups = [item["params"] if isinstance(item, dict) else [item] for item in params]
    found = [one for group in groups for one in ([group] if isinstance(group, Tensor) else group)]
    tensors = [one[1] if isinstance(one, tuple) else one for one in found]
    return all(
        isinstance(one, Tensor) and one.device.type in _FUSED_DEVICES and one.is_floating_point() for one in tensors
    )


__all__ = ["AdamW"]
