"""The pairs A, B of a model, and the ``r × r`` Gram matrices ``A Aᵀ`` and ``Bᵀ B`` of the whole factors.

A factor that is cut over an axis is so along the dimension that its Gram matrix sums over. So the matrix is the sum of
the ranks' own, and all those of a model travel in one ``all_reduce`` of ``r²`` numbers per layer and axis. What
fully-sharded parallelism shards is gathered as for a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt.inject import adapter_modules
from lorica.engines.kinds import is_distributed
from lorica.engines.rest import at_rest, unshard
from lorica.engines.site import Axis
from lorica.layers import LoraLayer
from lorica.layout import Roles
from lorica.variants import VARIANTS

#: Local rows of B that belong to one A: where several projections are fused, one run of them for each.
Rows = list[slice]


@dataclass(frozen=True)
class Pair:
    """One adapter on one layer.

    Attributes:
        name: ``adapter/layer``, unique in the model.
        layer: the adapted layer.
        adapter: the adapter's name.
    """

    name: str
    layer: LoraLayer
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """A as it is at rest."""
        return self.layer.factors(self.adapter).a  # type: ignore[return-value]

    @property
    def b(self) -> nn.Parameter:
        """B as it is at rest."""
        return self.layer.factors(self.adapter).b  # type: ignore[return-value]

    @property
    def lookup(self) -> bool:
        """Whether A is looked up: an embedding's, which starts at zero while B is random."""
        return self.layer.op.lookup

    @property
    def scaling(self) -> float:
        """``s`` as it is now."""
        return float(self.layer.scaling[self.adapter])

    @property
    def parts(self) -> list[Rows]:
        """For each A of the layer, this rank's rows of B that belong to it."""
        layer = self.layer
        if not layer.op.parts(layer.base_layer):
            return [[slice(None)]]
        assert layer.site is not None  # only layers that are laid out have parts
        return [[slice(*rows) for rows in held] for held in layer.site.layout.part_rows(layer.site.at)]

    @property
    def is_product(self) -> bool:
        """Whether ``B·A`` is a product over the rank, with one A for each part: not of a grouped convolution, nor where
        a variant has factors of another shape."""
        op, spec = self.layer.op, self.layer.specs[self.adapter]
        rank, shapes = spec.r, op.factor_shapes(self.layer.base_layer, spec.r)
        if VARIANTS[spec.variant].shapes(shapes, op, spec) != shapes:
            return False
        expert = op.roles_a[0] == "expert"
        a, b = _flat(self.a, expert=expert), _flat(self.b, expert=expert)
        return a.shape[-2] == len(self.parts) * rank and b.shape[-1] == rank

    def roles(self, of: str) -> Roles:
        """The role of each dimension of ``"a"`` or ``"b"``."""
        return self.layer.op.roles_a if of == "a" else self.layer.op.roles_b

    def apply(self, of: str, gradient: Tensor, matrices: Tensor) -> Tensor:
        """Multiply a whole gradient by one ``r × r`` matrix for each part, on the side of the rank.

        Args:
            of: ``"a"``: ``M·g``; ``"b"``: ``g·M``.
            gradient: in the shape of the factor in a forward.
            matrices: ``[P, r, r]``, or ``[P, E, r, r]`` for stacked experts.
        """
        flat = _flat(gradient, expert=self.roles(of)[0] == "expert")
        if of == "a":
            made = torch.cat([m @ g for m, g in zip(matrices, flat.chunk(len(matrices), -2), strict=True)], -2)
        elif len(matrices) == 1:
            made = flat @ matrices[0]
        else:
            made = torch.empty_like(flat)
            for matrix, rows in zip(matrices, self.parts, strict=True):
                for part in rows:
                    made[..., part, :] = flat[..., part, :] @ matrix
        return made.reshape(gradient.shape)


def pairs(model: nn.Module, wanted: Callable[[Pair], bool] = lambda pair: True) -> list[Pair]:
    """Return the pairs of all adapters of a model, in its order; those of tied layers are their source's.

    Args:
        model: an adapted model.
        wanted: leaves out those that it refuses.
    """
    found = [
        Pair(f"{adapter}/{name}", layer, adapter)
        for name, layer in adapter_modules(model)
        if isinstance(layer, LoraLayer)
        for adapter in layer.specs
        if adapter not in layer.tied
    ]
    return [pair for pair in found if wanted(pair)]


@torch.no_grad()
def grams(asked: Sequence[tuple[Pair, str]]) -> list[Tensor]:
    """Return ``A Aᵀ`` or ``Bᵀ B`` of whole factors, in float32 or wider: ``[P, …, r, r]`` for ``P`` parts.

    Collective over the axes that cut the factors and, where fully-sharded parallelism keeps shards, over its.

    Args:
        asked: pairs, each with ``"a"`` or ``"b"``.
    """
    found = [_own_gram(pair, of) for pair, of in asked]
    over: dict[str, tuple[Axis, list[int]]] = {}
    for place, (pair, of) in enumerate(asked):
        for axis in _axes(pair, of):
            over.setdefault(axis.name, (axis, []))[1].append(place)
    for _, (axis, places) in sorted(over.items()):
        _sum(axis, [found[place] for place in places])
    return found


def _own_gram(pair: Pair, of: str) -> Tensor:
    factor = unshard((pair.a if of == "a" else pair.b).detach())
    wide = torch.promote_types(factor.dtype, torch.float32)
    flat = _flat(factor, expert=pair.roles(of)[0] == "expert").to(wide)
    if of == "a":
        return torch.stack([part @ part.mT for part in flat.chunk(len(pair.parts), -2)])
    weighted = flat * _shares(pair, flat).unsqueeze(-1)
    return torch.stack(
        [
            sum((flat[..., rows, :].mT @ weighted[..., rows, :] for rows in part), flat.new_zeros(()))
            if part
            else flat.new_zeros(flat.shape[-1], flat.shape[-1])
            for part in pair.parts
        ]
    )


def _shares(pair: Pair, b: Tensor) -> Tensor:
    """Return, for each row of B, one over the number of ranks that hold it: of keys and values there can be several."""
    shares = b.new_ones(b.shape[-2])
    site = pair.layer.site
    cut = None if site is None else site.layout.cut_of("out")
    if site is not None and cut is not None and cut.copies > 1:
        for start, stop, count in cut.counted(site.at[cut.axis]):
            shares[start:stop] = 1 / count
    return shares


def _axes(pair: Pair, of: str) -> Iterable[Axis]:
    """Yield the axes that cut the dimension which a Gram matrix sums over."""
    site = pair.layer.site
    cut = None if site is None else site.layout.cut_of("in" if of == "a" else "out")
    if site is not None and cut is not None and cut.dim in pair.roles(of):
        axis = site.axes.get(cut.axis)
        if axis is not None and axis.size > 1:
            yield axis


def _sum(axis: Axis, matrices: Sequence[Tensor]) -> None:
    wide = torch.float64 if any(matrix.dtype == torch.float64 for matrix in matrices) else torch.float32
    buffer = torch.cat([matrix.flatten().to(wide) for matrix in matrices])
    dist.all_reduce(buffer, group=axis.group)
    for matrix, values in zip(matrices, torch.split(buffer, [matrix.numel() for matrix in matrices]), strict=True):
        matrix.copy_(values.view(matrix.shape))


def _flat(factor: Tensor, *, expert: bool) -> Tensor:
    """Return a factor without the dimensions of a kernel."""
    return factor if expert else factor.flatten(1)


def whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return a gradient as its factor is in a forward; one collective where it is sharded at rest."""
    return None if parameter.grad is None else unshard(parameter.grad)


def kept(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return what this rank keeps of a tensor in the shape of a parameter in a forward."""
    return whole[at_rest(parameter).slices] if is_distributed(parameter) else whole


__all__ = ["Pair", "grams", "kept", "pairs", "whole_gradient"]
