"""The weight specs of a live model that :func:`lorica.parallel.parallelize` cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn

from lorica.engines.native.base import Native
from lorica.engines.native.gqa import GQAQKVColumnParallelLinear
from lorica.errors import LayoutError
from lorica.layout import Layout
from lorica.layout.specs import Spec, WeightSpecs


def specs_of(model: nn.Module) -> WeightSpecs:
    """Return how each tensor of a cut base model comes from the logical ones.

    A weight that was fused before the cut (Phi-3's ``qkv_proj``) is fused in the model's files too, so it is one
    logical tensor; its projections have factors of their own all the same. What a ``GQAQKVColumnParallelLinear`` fuses
    are three logical ones, with the names that ``q_proj``, ``k_proj`` and ``v_proj`` would have in its place.

    Args:
        model: what ``parallelize`` made, or any model of native layers; without adapters. Where fully-sharded
            parallelism stores it, the specs are those of the tensors of a forward.

    Raises:
        LayoutError: the model is adapted.
    """
    specs: list[Spec] = []
    owners: dict[int, list[str]] = defaultdict(list)
    parents = {
        place: module for place, module in model.named_modules() if isinstance(module, GQAQKVColumnParallelLinear)
    }
    for place, module in model.named_modules():
        if "base_layer" in module._modules:
            raise LayoutError(f"{place} is adapted; the specs are those of the base model: take them before")
        inside = _owner(place) if _owner(place) in parents else None
        for name, tensor in _tensors(module):
            spec = _spec(place, module, name, tensor, inside)
            specs.append(spec)
            owners[id(tensor)].append(spec.parts[0][0])
    return WeightSpecs(tuple(specs), tuple(tuple(names) for names in owners.values() if len(names) > 1))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _spec(place: str, module: nn.Module, name: str, tensor: Tensor, inside: str | None) -> Spec:
    local = _within(place, name)
    if not isinstance(module, Native) or name not in module.roles:
        roles = tuple(f"dim{dim}" for dim in range(tensor.dim()))
        return Spec(local, ((local, 0),), roles, Layout({}))
    roles, layout = module.roles[name], module.layout
    if inside is None:
        return Spec(local, ((local, layout.sizes["out"]),), roles, layout)
    projections = layout.parts or ((place.rpartition(".")[2], layout.sizes["out"]),)
    return Spec(local, tuple((_within(_owner(inside), f"{n}.{name}"), rows) for n, rows in projections), roles, layout)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _within(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


__all__ = ["specs_of"]
