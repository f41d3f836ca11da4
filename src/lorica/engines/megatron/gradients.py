"""What Megatron's own training machinery does with gradients of factors, and what is left to do after it.

Its ``DistributedDataParallel`` and optimisers read attributes of parameters; ``finalize_model_grads`` then averages
over data ranks and, under sequence parallelism, sums the gradients of parameters that are marked. Without sequence
parallelism it sums nothing over tensor-parallel ranks, where a factor that all of them hold has a share of its
gradient each. That sum is done right after it, in ``config.finalize_model_grads_func``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from lorica.engines.megatron.experts import EXPERT_DATA, EXPERT_TENSOR, is_expert
from lorica.engines.megatron.groups import DATA, TENSOR
from lorica.engines.megatron.models import chunks_of
from lorica.engines.site import Site
from lorica.layout import Roles


def mark(module: nn.Module, site: Site, parameter: nn.Parameter, roles: Roles) -> None:
    """Give a factor the attributes that Megatron reads.

    Args:
        module: the base layer.
        site: where it lies.
        parameter: one of an adapter's.
        roles: of its dimensions.
    """
    marked: Any = parameter
    cut = {found.dim for found in site.layout.cuts}
    dims = [dim for dim, role in enumerate(roles) if role in cut]
    marked.tensor_model_parallel = bool(dims)
    marked.partition_dim = dims[0] if dims else -1
    marked.partition_stride = 1
    # Of routed experts, whose data-parallel groups are others. Megatron marks their weights where there is expert
    # parallelism; but without it too, ranks of one sequence may have the same expert and other tokens.
    marked.allreduce = not is_expert(module)
    if is_expert(module):
        # In the norm of all gradients it counts what is cut, and of the rest what the first tensor-parallel rank of
        # dense layers has, unless something is "shared"; experts lie over those ranks in another way.
        marked.tensor_model_parallel = True
        marked.shared = not dims and site.at[EXPERT_TENSOR] > 0
    parallel = bool(getattr(getattr(module, "config", None), "sequence_parallel", False))
    marked.sequence_parallel = parallel and TENSOR in site.layout.summed(roles)


def reduces(parameter: nn.Parameter) -> tuple[str, ...]:
    """Return the axes over which Megatron reduces the gradient of a parameter in its buffers by itself."""
    if not hasattr(parameter, "main_grad"):
        return ()
    return (DATA, EXPERT_DATA, *([TENSOR] if getattr(parameter, "sequence_parallel", False) else []))


class _Finalize:
    """In the place of ``config.finalize_model_grads_func``: the function that was there, then what is left to do."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self._before = before
        self._then: dict[int, Callable[[], None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._before(*args, **kwargs)
        for then in [*self._then.values()]:
            then()
        return result

    def add(self, model: nn.Module, then: Callable[[], None]) -> None:
        key = id(model)
        if key not in self._then:
            self._then[key] = then
            weakref.finalize(model, self._then.pop, key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._before  # a copied configuration is of another model


def finish_with(model: nn.Module, finish: Callable[[nn.Module], None]) -> None:
    """Let ``finish(model)`` be called whenever Megatron has finished the gradients of a model, and once for each.

    The function that finishes them is set by the training loop, later than adapters are added; so it is looked for when
    the model runs.

    Args:
        model: the base model, or the list of its chunks.
        finish: sums what is left.
    """
    reference = weakref.ref(model)

    def then() -> None:
        if (alive := reference()) is not None:
            finish(alive)

    def before_forward(chunk: Any, args: Any) -> None:
        config, alive = chunk.config, reference()
        if alive is None or not chunk.training:
            return
        found = getattr(config, "finalize_model_grads_func", None)
        if found is None:
            _warn_once(alive)
            return
        if not isinstance(found, _Finalize):
            found = config.finalize_model_grads_func = _Finalize(found)
        found.add(alive, then)

    if "lorica_finishing" not in model.__dict__:
        model.__dict__["lorica_finishing"] = [
            chunk.register_forward_pre_hook(before_forward) for chunk in chunks_of(model)
        ]


def _warn_once(model: nn.Module) -> None:
    said: Any = model.__dict__
    collected = any(hasattr(parameter, "main_grad") for parameter in model.parameters() if parameter.requires_grad)
    if collected and not said.get("lorica_warned_of_finishing"):
        said["lorica_warned_of_finishing"] = True
        warnings.warn(
            "Megatron's DDP collects the gradients, and config.finalize_model_grads_func is not set: call "
            "lorica.parallel.sum_gradients(model) after finalize_model_grads and before anything reads gradients",
            stacklevel=2,
        )


__all__ = ["finish_with", "mark", "reduces"]
