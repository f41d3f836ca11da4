"""Arrow: every token goes through those of a layer's adapters that fit it best (https://arxiv.org/abs/2405.11157).

::

    prototype   v_e = the direction of inputs that s·B_e·A_e makes longest (its first right singular vector)
    scores      |x · v_e|, of which the top k stay; c = softmax(scores / temperature), 0 for the others
    output      y + Σ c_e · s_e · (x A_eᵀ) B_eᵀ

With GenKnowSub (https://aclanthology.org/2025.acl-short.54/) the mean of general adapters' factors is first taken out
of the others'. The adapters themselves stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.engines.native.collectives import enter, leave
from lorica.engines.site import Axis, Site
from lorica.errors import AdapterError, TargetError
from lorica.init import Factors
from lorica.ops import Op
from lorica.ops.dropout import drop
from lorica.variants.base import Hosting, Variant

#: How general adapters are named, whenever they came.
_GENERAL = re.compile(r"gks_\d+")
#: A direction counts as one when the delta makes it this much longer than nothing.
_TINY = 1e-20


class Arrow(Variant):
    """The router; its own factors have no part in the output (PEFT's files hold them all the same).

    Any number of adapters may come and go beside it: all of a layer's take part but routers and general ones. A layer
    that is cut by its inputs sums ``tokens × adapters`` scores over the axis, each way; every layer that is cut sums
    ``r × r`` values for each adapter whose factors have changed.
    """

    across: ClassVar[bool] = False  # scores need the input that the base weight is multiplied with
    unmergeable: ClassVar[str] = "Cannot merge an active Arrow router adapter. Remove it first."

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """Scores are of inputs that are multiplied."""
        if type(op).matrices is Op.matrices:
            raise TargetError(f"{where}: arrow_config is not supported for a layer of the kind {op.kind}")

    def add(self, y: Tensor, x: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Add the chosen adapters' parts of every token, as one product of the sum of their ranks."""
        experts = _experts(layer, spec)
        x_TI = x.reshape(-1, x.shape[-1])
        share_TE = _shares(x_TI, layer, experts, spec)
        a_RI, b_OR = experts.a.to(y.dtype), experts.b.to(y.dtype)
        h_TR = F.linear(x_TI.to(y.dtype), a_RI)
        h_TR = h_TR * (share_TE * experts.scales).to(y.dtype).repeat_interleave(experts.ranks, 1)
        y_TO = y.reshape(-1, len(b_OR))
        if spec.dropout and layer.training:
            part = F.linear(h_TR, b_OR)
            return (y_TO + drop(part, spec, spec.dropout_position, layer.site, True)).view(y.shape)
        return torch.addmm(y_TO, h_TR, b_OR.mT).view(y.shape)


class _Experts(NamedTuple):
    """The adapters that tokens go through, side by side; ``R`` the sum of their ranks.

    Attributes:
        a: ``[R, in]``.
        b: ``[out, R]``.
        scales: ``[E]``.
        ranks: ``[E]``, the rank of each.
        prototypes: ``[E, in]``.
    """

    a: Tensor
    b: Tensor
    scales: Tensor
    ranks: Tensor
    prototypes: Tensor


def _shares(x_TI: Tensor, layer: Hosting, experts: _Experts, spec: AdapterSpec) -> Tensor:
    """Return how much of each adapter each token gets, ``[T, E]``."""
    score_TE = x_TI.to(experts.prototypes.dtype) @ experts.prototypes.mT
    if (axis := _axis(layer.site, "in")) is not None:
        score_TE = enter(leave(score_TE, axis), axis)
    best_TK, places_TK = score_TE.abs().topk(min(spec.options.top_k, score_TE.shape[1]), dim=1)
    share_TK = torch.softmax(best_TK / spec.options.router_temperature, dim=1)
    return torch.zeros_like(score_TE).scatter(1, places_TK, share_TK)


def _experts(layer: Hosting, spec: AdapterSpec) -> _Experts:
    """Return the adapters side by side, as made in the last forward if nothing was written to them since."""
    tasks, general = _names(layer, spec)
    found = {name: layer.factors(name) for name in (*tasks, *general)}
    tensors = [tensor for factors in found.values() for tensor in (factors.a, factors.b)]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if trains or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return _made(layer, spec, tasks, general, found)
    state = (*found, *((id(t), t._version) for t in tensors), *(layer.specs[name].scaling for name in tasks))
    kept = layer.notes.get(_NOTE)
    if kept is None or kept[0] != state:
        with torch.inference_mode(False):
            kept = layer.notes[_NOTE] = (state, _made(layer, spec, tasks, general, found))
    experts: _Experts = kept[1]
    return experts


def _names(layer: Hosting, spec: AdapterSpec) -> tuple[list[str], list[str]]:
    """Return the adapters that tokens go through, and the general ones."""
    general = list(spec.options.gks_adapter_names or ()) if spec.options.use_gks else []
    others = [
        name
        for name, known in layer.specs.items()
        if known.variant != "arrow_config" and name not in general and not _GENERAL.fullmatch(name)
    ]
    if not layer.stored.is_meta:  # one that another thread is loading has no values yet
        others = [name for name in others if not layer.factors(name).b.is_meta]
    missing = [name for name in general if name not in layer.specs]
    if missing or not others:
        raise AdapterError(
            f"{layer.target_name}: an Arrow router needs adapters to route to on the same layer; "
            + (f"{missing} are not there" if missing else "there is none. Load some, or use create_arrow_model")
        )
    return others, general


def _made(
    layer: Hosting, spec: AdapterSpec, tasks: Sequence[str], general: Sequence[str], found: dict[str, Factors]
) -> _Experts:
    pairs = [layer.op.matrices(layer, found[name]) for name in tasks]
    a, b = ([pair[side] for pair in pairs if pair is not None] for side in (0, 1))
    if general:
        mean = [layer.op.matrices(layer, found[name]) for name in general]
        mean_a = torch.stack([pair[0] for pair in mean if pair is not None]).mean(0)
        mean_b = torch.stack([pair[1] for pair in mean if pair is not None]).mean(0)
        a, b = [one - mean_a for one in a], [one - mean_b for one in b]
    device = a[0].device
    scales = torch.tensor([layer.specs[name].scaling for name in tasks], dtype=a[0].dtype, device=device)
    ranks = torch.tensor([len(one) for one in a], device=device)
    with torch.no_grad():
        prototypes = torch.stack([longest(*pair, layer.site).to(a[0].dtype) for pair in zip(a, b, strict=True)])
    return _Experts(torch.cat(a), torch.cat(b, 1), scales, ranks, prototypes)


def longest(a_RI: Tensor, b_OR: Tensor, site: Site | None = None) -> Tensor:
    """Return the first right singular vector of ``B·A``, what this rank has of it; zeros where there is none.

    With ``K = A Aᵀ`` and ``G = Bᵀ B``, both ``r × r``, it is ``Aᵀ K^-½ u`` for the first eigenvector ``u`` of
    ``K^½ G K^½``. Nothing of the delta's size is formed; in float64.

    Args:
        a_RI: ``[r, in]``.
        b_OR: ``[out, r]``.
        site: where they lie among the ranks; the two small matrices are summed over the axes that cut them.
    """
    a_RI, b_OR = a_RI.double(), b_OR.double()
    k, g = _gram(a_RI, site, "in"), _gram(b_OR.mT, site, "out")
    values, vectors = torch.linalg.eigh(k)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = torch.where(kept, values.clamp_min(0), 0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, root, 1), 0)
    lengths, u = torch.linalg.eigh(root.unsqueeze(1) * (vectors.mT @ g @ vectors) * root)
    direction = a_RI.mT @ (vectors @ (inverse * u[:, -1]))
    return torch.where(lengths[-1] > _TINY, direction, torch.zeros_like(direction))


def _axis(site: Site | None, role: str) -> Axis | None:
    cut = None if site is None else site.layout.cut_of(role)
    return None if site is None or cut is None else site.axes[cut.axis]


def _gram(rows_RX: Tensor, site: Site | None, role: str) -> Tensor:
    """Return ``M Mᵀ`` of the whole ``M [r, …]``, of whose columns this rank has those of a role."""
    axis = _axis(site, role)
    if site is None or axis is None:
        return rows_RX @ rows_RX.mT
    cut = site.layout.cut_of(role)
    assert cut is not None
    held = torch.zeros(site.layout.sizes[role], dtype=rows_RX.dtype, device=rows_RX.device)
    for intervals in cut.held:
        for start, stop in intervals:
            held[start:stop] += 1  # ranks that have it; copies of key/value heads count once together
    matrix = (rows_RX / site.layout.take(held, (role,), site.at)) @ rows_RX.mT
    dist.all_reduce(matrix, group=axis.group)
    return matrix


_NOTE = "arrow"

__all__ = ["Arrow", "longest"]
