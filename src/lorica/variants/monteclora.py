"""MonteCLoRA: in training A has learned noise, averaged over Monte Carlo samples (https://arxiv.org/abs/2411.04358).

::

    A' = A + ε·Σₙ wₙ·Zₙ·√v        Z normal,  v ~ e^2σ·(χ² of r degrees),  w = softmax of a normal around π

σ (one for each row of A) and π (one for each sample) learn, from the loss and from
:func:`~lorica.variants.losses.monteclora_loss`. Evaluation and merging are plain LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.config.options import MontecloraConfig
from lorica.config.spec import AdapterSpec
from lorica.init import Factors
from lorica.kernels import draw_seed
from lorica.ops.dropout import mixed
from lorica.variants.base import Extra, Hosting, Variant, drawn

_SAMPLER = "lora_monteclora_sampler"
#: Names in a file, below the layer.
LOG_STD, LOG_WEIGHTS = f"{_SAMPLER}.std_prior", f"{_SAMPLER}.expert_weights_prior"
#: What PEFT keeps of the last sample. Here they stay as they start, so that replicas stay equal.
LAST_VARIANCE, LAST_WEIGHTS = f"{_SAMPLER}.gaussian_var_prior", f"{_SAMPLER}.expert_weights"

_LEAST_VARIANCE, _LEAST = 1e-3, 1e-6


@dataclass
class Sample:
    """What the loss needs of the last forward, attached to its graph.

    Attributes:
        variance: ``v``, ``[pairs, r]``.
        weights: ``w``, ``[pairs, samples]``.
    """

    variance: Tensor
    weights: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return Sample(self.variance.detach().clone(), self.weights.detach().clone())  # a copy has no graph


class Monteclora(Variant):
    """Noise on A, the same for all tokens of a forward; every pair (expert, fused projection) has its own.

    On one process it is drawn from torch's default generator. A layer that lies over ranks takes one draw from it in a
    forward (so that activation checkpointing draws again what it drew), to seed generators of its own: ranks that share
    a batch draw the same, but for what is theirs alone of A; ranks with batches of their own draw apart.
    """

    random = True

    def extras(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> list[Extra]:
        """σ ``[r]``, π ``[samples]`` and PEFT's two buffers ``[r, r]`` and ``[samples]``; with leading experts."""
        shape, rank = factors.a.shape, layer.op.roles_a.index("rank")
        lead, rows = shape[:rank], shape[rank]
        roles = layer.op.roles_a[:rank]
        samples = rows // spec.r * spec.options.num_samples
        return [
            Extra(LOG_STD, *_place(LOG_STD), (*roles, "rank"), torch.Size((*lead, rows))),
            Extra(LOG_WEIGHTS, *_place(LOG_WEIGHTS), (*roles, "sample"), torch.Size((*lead, samples))),
            Extra(
                LAST_VARIANCE, *_place(LAST_VARIANCE), (*roles, "rank", "r"), torch.Size((*lead, rows, spec.r)), False
            ),
            Extra(LAST_WEIGHTS, *_place(LAST_WEIGHTS), (*roles, "sample"), torch.Size((*lead, samples)), False),
        ]

    def start(self, layer: Hosting, factors: Factors, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
        """σ and π uniform between 0 and 1."""
        std, weights, variance, last = self.extras(layer, factors, spec)
        eye = torch.eye(spec.r).repeat(*variance.shape[:-2], variance.shape[-2] // spec.r, 1)
        return {
            LOG_STD: drawn(layer, std, seed, lambda tensor, generator: tensor.uniform_(generator=generator)),
            LOG_WEIGHTS: drawn(layer, weights, seed, lambda tensor, generator: tensor.uniform_(generator=generator)),
            LAST_VARIANCE: eye,
            LAST_WEIGHTS: torch.full(last.shape, 1 / spec.options.num_samples),
        }

    def in_forward(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Factors:
        """In training, A with noise."""
        if not layer.training:
            return self.plain(layer, factors, spec)
        behind = factors.a.shape[layer.op.roles_a.index("rank") + 1 :]
        a_LRI = factors.a.reshape(-1, spec.r, behind.numel())
        noise, chance, odds = draws(layer, a_LRI, spec.options)
        sample = sampled(factors, chance, odds, spec)
        adapter = next(name for name, known in layer.specs.items() if known is spec)
        layer.notes[(_SAMPLER, adapter)] = sample
        size = spec.options.sample_scaler * sample.variance.sqrt().unsqueeze(-1)
        mean = torch.einsum("ln,nlri->lri", sample.weights, noise) * size
        return Factors((a_LRI + mean.nan_to_num()).view(factors.a.shape), factors.b, factors.bias)


def draws(layer: Hosting, a_LRI: Tensor, options: MontecloraConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one forward draws, for ``L`` pairs of factors.

    Returns:
        Normal noise ``[samples, L, r, in]``; the diagonal of a Wishart matrix of ``r`` degrees of freedom, ``[L, r]``,
        which is ``r`` independent χ² values; normal ``[L, samples]``.
    """
    device, own, common = a_LRI.device, None, None
    if layer.site is not None:
        seed = draw_seed()
        own, common = (
            torch.Generator(device).manual_seed(mixed(seed + shift, layer.site, roles))
            for shift, roles in ((0, ("in", "expert")), (1, ("expert",)))
        )
    pairs, r, _ = a_LRI.shape
    noise = torch.randn((options.num_samples, *a_LRI.shape), generator=own, device=device, dtype=a_LRI.dtype)
    chance = torch.randn((pairs, r, r), generator=common, device=device, dtype=a_LRI.dtype).square().sum(-1)
    odds = torch.randn((pairs, options.num_samples), generator=common, device=device, dtype=a_LRI.dtype)
    return noise, chance, odds


def sampled(factors: Factors, chance_LR: Tensor, odds_LN: Tensor, spec: AdapterSpec) -> Sample:
    """Return the variances of A's rows and the weights of the samples; a Dirichlet's are approximated in log space."""
    std = factors.extras[LOG_STD].view(-1, spec.r)
    variance = (torch.exp(2 * std) * chance_LR).clamp(min=_LEAST_VARIANCE)
    count = spec.options.num_samples
    alpha = torch.exp(factors.extras[LOG_WEIGHTS].view(-1, count)).clamp(min=_LEAST)
    mean = alpha.log() - alpha.log().mean(-1, keepdim=True)
    spread = (1 - 2 / count) / alpha + (1 / alpha).sum(-1, keepdim=True) / count**2
    weights = torch.softmax((spread.clamp(min=_LEAST) + _LEAST).sqrt() * odds_LN + mean, dim=-1)
    return Sample(variance, weights)


def last_sample(layer: Hosting, adapter: str, factors: Factors) -> Sample:
    """Return the sample of the last forward; before the first one, what it starts with."""
    spec = layer.specs[adapter]
    found: Sample | None = layer.notes.get((_SAMPLER, adapter))
    if found is not None:
        return found
    variance = factors.extras[LAST_VARIANCE].view(-1, spec.r, spec.r).diagonal(dim1=-2, dim2=-1)
    return Sample(variance, factors.extras[LAST_WEIGHTS].view(-1, spec.options.num_samples))


def _place(name: str) -> tuple[str, str]:
    container, _, tensor = name.partition(".")
    return container, tensor
