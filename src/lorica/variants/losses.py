"""Losses that a variant adds to the task's, on any layout: every rank gets the value of one process.

To be added to the loss before ``backward``. What ranks hold together counts once in the sums of gradients that follow
(:func:`lorica.parallel.sum_gradients`): each rank's gradient is its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.engines.rest import unshard
from lorica.engines.site import Site
from lorica.layout import Roles
from lorica.variants.base import Hosting
from lorica.variants.kasa import DIAGONAL
from lorica.variants.monteclora import LOG_STD, LOG_WEIGHTS, last_sample


def kasa_loss(layers: Iterable[Hosting], adapters: Iterable[str]) -> Tensor | float:
    """Return ``β·Σd² + γ·(‖BᵀB - 1‖ + ‖AAᵀ - 1‖)``, summed over all pairs of factors (equations 9 to 12 of the paper).

    Args:
        layers: of one model.
        adapters: which of their adapters count.
    """
    found = [_penalty(layer, name) for layer, name in _having(layers, adapters, "kasa_config")]
    return sum(found[1:], found[0]) if found else 0.0


def monteclora_loss(layers: Iterable[Hosting], adapters: Iterable[str]) -> Tensor | float:
    """Return the mean over all pairs of factors of the Kullback-Leibler divergences between what is learned and the
    priors, of the weights, the variances and the noise, and of the entropy term; 0 outside of training.

    Args:
        layers: of one model.
        adapters: which of their adapters count.
    """
    found = [(_divergence(layer, name), _pairs_of(layer, name)) for layer, name in _having(layers, adapters, _MONTE)]
    if not found or not any(isinstance(value, Tensor) for value, _ in found):
        return 0.0
    total = sum(value for value, _ in found)
    return total / sum(count for _, count in found)


_MONTE = "monteclora_config"
#: Variants that add a loss.
WITH_LOSS = ("kasa_config", _MONTE)


def _having(layers: Iterable[Hosting], adapters: Iterable[str], variant: str) -> Iterator[tuple[Hosting, str]]:
    adapters = tuple(adapters)
    for layer in layers:
        for name in adapters:
            if name in layer.specs and layer.specs[name].variant == variant:
                yield layer, name


# ---- KaSA -----------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """The factors of one projection, or of each of this rank's experts.

    Attributes:
        a: ``[…, r, in]``.
        b: ``[…, out, r]``.
        rows: which rows of the layer's outputs those of ``b`` are.
        values: ``[…, r]``.
    """

    a: Tensor
    b: Tensor
    rows: Tensor
    values: Tensor


def _penalty(layer: Hosting, name: str) -> Tensor:
    spec, op = layer.specs[name], layer.op
    total: Tensor | float = 0.0
    for pair in _pairs(layer, name):
        one = torch.eye(spec.r, device=pair.a.device, dtype=pair.a.dtype)
        weights = _counted_once(layer.site, "out", pair.rows).unsqueeze(-1)
        gram_a = _summed(layer.site, "in", pair.a @ pair.a.mT)
        gram_b = _summed(layer.site, "out", (pair.b * weights.to(pair.b)).mT @ pair.b)
        off = torch.linalg.matrix_norm(gram_a - one) + torch.linalg.matrix_norm(gram_b - one)
        each = spec.options.beta * pair.values.square().sum(-1) + spec.options.gamma * off
        total = total + (_summed(layer.site, "expert", each.sum()) if op.roles_a[0] == "expert" else each)
    assert isinstance(total, Tensor)
    return total


def _pairs(layer: Hosting, name: str) -> Iterator[_Pair]:
    """Yield the pairs of an adapter in float32 (float64 stays), their gradients scaled to this rank's share."""
    op, spec, site = layer.op, layer.specs[name], layer.site
    factors = layer.factors(name).map(unshard)
    lead = op.roles_a.index("rank")
    values = _shared(site, op.roles_a[: lead + 1], factors.extras[DIAGONAL])
    a = _shared(site, op.roles_a, factors.a).flatten(lead + 1)
    b = _shared(site, op.roles_b, factors.b).flatten(lead + 1)
    rows = torch.arange(b.shape[lead], device=b.device)
    parts = op.parts(layer.base_layer)
    if not parts:
        yield _Pair(a, b, rows, values)
        return
    held = site.layout.part_rows(site.at) if site is not None else [((first, last),) for _, first, last in parts]
    for index, (part, _, _) in enumerate(parts):
        mine = slice(index * spec.r, (index + 1) * spec.r)
        if not spec.parts or part in spec.parts:
            its = torch.cat([rows[start:stop] for start, stop in held[index]] or [rows[:0]])
            yield _Pair(a[mine], b[its], its, values[mine])


# ---- MonteCLoRA -----------------------------------------------------------------------------------------------------


def _pairs_of(layer: Hosting, name: str) -> int:
    spec, op = layer.specs[name], layer.op
    if op.roles_a[0] == "expert":
        return len(layer.factors(name).a) if layer.site is None else layer.site.layout.sizes["expert"]
    return len(spec.parts) or len(op.parts(layer.base_layer)) or 1


def _divergence(layer: Any, name: str) -> Tensor | float:
    """Return the loss of all pairs of one adapter of a layer, summed."""
    if not layer.training:
        return 0.0
    spec, op, site = layer.specs[name], layer.op, layer.site
    options, r = spec.options, spec.r
    lead = op.roles_a[: op.roles_a.index("rank")]
    factors = layer.factors(name).map(unshard)
    sample = last_sample(layer, name, factors)
    log_std = _shared(site, (*lead, "rank"), factors.extras[LOG_STD]).view(-1, r)
    alpha = _shared(site, (*lead, "sample"), factors.extras[LOG_WEIGHTS]).view(-1, options.num_samples).exp()
    variance = _shared(site, (*lead, "rank"), sample.variance).clamp(min=1e-6)
    weights = _shared(site, (*lead, "sample"), sample.weights)
    divergence = (
        _dirichlet(alpha, options.dirichlet_prior)
        + 0.5 * r * ((2 * log_std).exp() - 2 * log_std - 1).sum(-1)
        + 0.5 * options.num_samples * (variance - variance.log() - 1).sum(-1)
    )
    each = options.kl_loss_weight * divergence + (weights.square().sum(-1) if options.use_entropy else 0)
    if spec.parts:
        adapted = [part in spec.parts for part, _, _ in op.parts(layer.base_layer)]
        each = each[torch.tensor(adapted, device=each.device)]
    return _summed(site, "expert", each.sum()) if lead else each.sum()


def _dirichlet(alpha: Tensor, prior: float) -> Tensor:
    """Return ``KL(Dir(alpha) ‖ Dir(prior))`` for each row ``[…, n]``."""
    count, total = alpha.shape[-1], alpha.sum(-1)
    base = torch.tensor(prior, dtype=alpha.dtype, device=alpha.device)
    constant = (
        torch.lgamma(total) - torch.lgamma(alpha).sum(-1) - torch.lgamma(base * count) + count * torch.lgamma(base)
    )
    return constant + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(total).unsqueeze(-1))).sum(-1)


# ---- ranks ----------------------------------------------------------------------------------------------------------


def _shared(site: Site | None, roles: Roles, tensor: Tensor) -> Tensor:
    """Return a tensor in float32 (float64 stays) whose gradient is scaled so that what the ranks' gradients become
    together (:mod:`lorica.ranks.gradients`) is one process's."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if site is None:
        return wide
    cut = site.layout.sharded(roles)
    share = float(site.layout.batches)
    for axis in site.layout.summed(roles):
        share /= site.axes[axis].size if axis not in cut else 1
    return wide if share == 1 else wide.detach() + share * (wide - wide.detach())


def _summed(site: Site | None, role: str, value: Tensor) -> Tensor:
    """Return the sum over the ranks among which a dimension is divided; its gradient goes to this rank's summand."""
    cut = None if site is None else site.layout.cut_of(role)
    if site is None or cut is None:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, group=site.axes[cut.axis].group)
    return total + (value - value.detach())


def _counted_once(site: Site | None, role: str, positions: Tensor) -> Tensor:
    """Return 1 over the number of ranks that hold each of these local positions of a dimension."""
    cut = None if site is None else site.layout.cut_of(role)
    if site is None or cut is None:
        return torch.ones(len(positions), device=positions.device)
    holders = torch.zeros(cut.total)
    for held in cut.held:
        for start, stop in held:
            holders[start:stop] += 1
    local = site.layout.take(1 / holders, (role,), site.at)
    return local.to(positions.device)[positions]
