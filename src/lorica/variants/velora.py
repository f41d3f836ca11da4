"""VeLoRA: what the gradient of A needs of the input is kept compressed (https://arxiv.org/abs/2405.17991).

::

    forward    h = x Aᵀ              kept: c = one number for every token and group of features, along a direction v
    backward   dA = dhᵀ · (c ⊗ v)    dx = dh · A, as without
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lorica.config.options import VeloraConfig
from lorica.config.spec import AdapterSpec
from lorica.engines.site import Axis, Site
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.ops import Op
from lorica.variants.base import Extra, Hosting, Variant, drawn

#: Name of the directions in a file, below the layer.
DIRECTION = "lora_velora_embed"


class Velora(Variant):
    """One direction for all groups of a layer's input (for each of several fused projections).

    With ``"batch_average"`` it is the mean group of the batch, worked out in every forward and not kept: the file holds
    zeros. Where the layer is cut by its inputs, or its tokens are divided, that mean is one ``all_reduce`` of a group's
    length in a training forward. Where groups lie across ranks (the cut is no multiple of their length), the compressed
    input is summed over the axis too: one number for every token and group.
    """

    across = False  # it needs the input that the base weight is multiplied with

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """The input must be vectors of features that A is multiplied with, in the layer's forward."""
        if op.kind != "Linear":
            raise TargetError(
                f"{where}: velora_config is not supported for a layer of the kind {op.kind}: it compresses the input "
                "of linear layers"
            )

    def extras(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> list[Extra]:
        """The direction, ``[in/groups]`` rounded up; of fused projections one after the other."""
        count = factors.a.shape[0] // spec.r
        length = _Groups.of(layer, factors.a.shape[1], spec.options).length
        return [Extra(DIRECTION, DIRECTION, "", ("group",), torch.Size((count * length,)), trains=False)]

    def start(self, layer: Hosting, factors: Factors, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
        """Zeros, until a batch has been seen; or random."""
        (extra,) = self.extras(layer, factors, spec)
        if spec.options.init_type != "random":
            return {DIRECTION: torch.zeros(extra.shape, device=factors.a.device)}
        made = drawn(layer, extra, seed, lambda tensor, generator: tensor.normal_(generator=generator))
        return {DIRECTION: _normal(made.view(factors.a.shape[0] // spec.r, -1)).to(factors.a.device)}

    def add(self, y: Tensor, x: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Add the adapter's part, the same as without; where something trains, by a product that keeps less."""
        if not (layer.training and torch.is_grad_enabled()):
            return super().add(y, x, layer, factors, spec)
        op: Any = layer.op
        product = partial(_product, layer=layer, kept=factors.extras[DIRECTION], spec=spec)
        added: Tensor = op.add(y, x, layer, Factors(factors.a, factors.b, factors.bias), spec, product)
        return added


@dataclass(frozen=True)
class _Groups:
    """How a layer's input features fall into groups.

    Attributes:
        length: features in a group; the last one may be shorter.
        features: number in the logical input of each of this rank's features; None: all of them, in order.
        count: groups of the logical input.
        whole: whether every group lies on one rank, and one after the other.
    """

    length: int
    features: Tensor | None
    count: int
    whole: bool

    @classmethod
    def of(cls, layer: Hosting, local: int, options: VeloraConfig, device: torch.device | None = None) -> _Groups:
        """Return the groups of a layer whose rank has ``local`` input features."""
        cut = None if layer.site is None else layer.site.layout.cut_of("in")
        size = local if cut is None else cut.total
        length = -(-size // options.num_groups)
        if cut is None or layer.site is None:
            return cls(length, None, options.num_groups, True)
        mine = cut.held[layer.site.at[cut.axis]]
        features = torch.cat([torch.arange(start, stop, device=device) for start, stop in mine or ((0, 0),)])
        edges = [edge for held in cut.held for interval in held for edge in interval]
        return cls(length, features, options.num_groups, all(edge % length == 0 for edge in edges))

    def fold(self, sums_I: Tensor) -> Tensor:
        """Return the sum of all groups, ``[D]``, of one number for each of this rank's features."""
        place = torch.arange(len(sums_I), device=sums_I.device) if self.features is None else self.features
        return sums_I.new_zeros(self.length).index_add(0, place % self.length, sums_I)


def _product(x_TI: Tensor, a_RI: Tensor, *, layer: Hosting, kept: Tensor, spec: AdapterSpec) -> Tensor:
    """``x Aᵀ``, of whose input the backward has the compressed form."""
    groups = _Groups.of(layer, x_TI.shape[1], spec.options, x_TI.device)
    directions_PD = _directions(x_TI.detach(), groups, layer, kept.view(-1, groups.length), spec)
    product: Tensor = _Compressed.apply(  # type: ignore[no-untyped-call]
        x_TI, a_RI, directions_PD.to(x_TI.dtype), groups, layer.site, spec.options.scale
    )
    return product


@torch.no_grad()
def _directions(x_TI: Tensor, groups: _Groups, layer: Hosting, kept_PD: Tensor, spec: AdapterSpec) -> Tensor:
    """Return the directions of this forward, ``[P, D]``."""
    kind = spec.options.init_type
    once = kind == "batch_average_once"
    if kind == "random" or (once and _is_set(layer, kept_PD, spec)):
        return kept_PD.clone()
    sums_D = groups.fold(x_TI.sum(0, dtype=torch.promote_types(x_TI.dtype, torch.float32)))
    for axis in _axes(layer.site, data=once):
        dist.all_reduce(sums_D, group=axis.group)
    found = _normal(sums_D).expand_as(kept_PD)
    if once:
        kept_PD.copy_(found)
    return found


def _is_set(layer: Hosting, kept_PD: Tensor, spec: AdapterSpec) -> bool:
    """Whether a direction was found already; asked of the tensor once."""
    adapter = next(name for name, known in layer.specs.items() if known is spec)
    key = (DIRECTION, adapter)
    if not layer.notes.get(key):
        layer.notes[key] = bool(kept_PD.any())
    found: bool = layer.notes[key]
    return found


def _axes(site: Site | None, *, data: bool) -> list[Axis]:
    """Return the axes over which the features or the tokens of one batch are divided, or also those of batches."""
    if site is None:
        return []
    cut = site.layout.cut_of("in")
    names = [*([cut.axis] if cut else []), *site.layout.sequence, *(site.layout.data if data else ())]
    return [site.axes[name] for name in dict.fromkeys(names) if site.axes[name].size > 1]


def _normal(vectors: Tensor) -> Tensor:
    """Return vectors of length 1; where there is nothing to go by, all features count alike."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(norm > 0, vectors / torch.where(norm > 0, norm, 1), vectors.shape[-1] ** -0.5)


def compressed_product(x_TI: Tensor, a_RI: Tensor, v_D: Tensor, groups: int, scale: float) -> Tensor:
    """Return ``x Aᵀ``; its backward has one number for every token and group of features, along the direction ``v``.

    Args:
        x_TI: the input.
        a_RI: the factor, whose gradient is approximate and multiplied by ``scale``.
        v_D: the direction, ``[in/groups]`` rounded up.
        groups: into how many groups the features fall.
        scale: of the gradient.
    """
    whole = _Groups(len(v_D), None, groups, True)
    product: Tensor = _Compressed.apply(x_TI, a_RI, v_D[None], whole, None, scale)  # type: ignore[no-untyped-call]
    return product


class _Compressed(torch.autograd.Function):
    """``x Aᵀ`` that keeps one number for every token and group."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, a_RI: Tensor, v_PD: Tensor, groups: _Groups, site: Site | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(_compressed(x_TI, v_PD, groups, site), a_RI, v_PD)
        ctx.groups, ctx.scale = groups, scale
        return F.linear(x_TI, a_RI)

    @staticmethod
    def backward(ctx: Any, dh_TR: Tensor) -> tuple[Tensor | None, ...]:
        c_TGP, a_RI, v_PD = ctx.saved_tensors
        dx = dh_TR @ a_RI if ctx.needs_input_grad[0] else None
        da = _gradient(dh_TR, c_TGP, v_PD, a_RI.shape, ctx.groups) * ctx.scale if ctx.needs_input_grad[1] else None
        return dx, da, None, None, None, None


def _compressed(x_TI: Tensor, v_PD: Tensor, groups: _Groups, site: Site | None) -> Tensor:
    """Return every group along every projection's direction, ``[T, G, P]``: of the groups that this rank has where they
    are whole, else of all."""
    tokens, local = x_TI.shape
    if groups.whole:
        padding = -local % groups.length
        return F.pad(x_TI, (0, padding)).view(tokens, -1, groups.length) @ v_PD.T
    assert groups.features is not None
    assert site is not None
    along = x_TI.unsqueeze(2) * v_PD.T[groups.features % groups.length]
    sums = x_TI.new_zeros(tokens, groups.count, len(v_PD)).index_add(1, groups.features // groups.length, along)
    cut = site.layout.cut_of("in")
    assert cut is not None
    dist.all_reduce(sums, group=site.axes[cut.axis].group)
    return sums


def _gradient(dh_TR: Tensor, c_TGP: Tensor, v_PD: Tensor, shape: torch.Size, groups: _Groups) -> Tensor:
    """Return ``dhᵀ · (c ⊗ v)`` for this rank's features; the input is not restored for it."""
    features = groups.features
    if groups.whole or features is None:
        features = torch.arange(shape[1], device=dh_TR.device)
    each = [
        (dh.T @ c)[:, features // groups.length] * v[features % groups.length]
        for dh, c, v in zip(dh_TR.chunk(len(v_PD), 1), c_TGP.unbind(2), v_PD, strict=True)
    ]
    return torch.cat(each)
