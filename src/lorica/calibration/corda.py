"""CorDA's statistics: the covariance of each layer's inputs, and the base weight decomposed along it
(https://arxiv.org/abs/2406.05223, https://github.com/iboing/CorDA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorica.adapt.inject import base_of, logical_weight
from lorica.calibration import files, over_ranks
from lorica.calibration.watch import Watch, adapters_off, mode, targets_of
from lorica.config import LoraConfig
from lorica.config.options import CordaConfig
from lorica.errors import AdapterError, CheckpointError, ConfigError
from lorica.init import INITS
from lorica.init.statistics import Found, keep
from lorica.lowrank import exact_svd
from lorica.targets import make_plan
from lorica.targets.plan import Target

#: How much of the mean diagonal is added to a covariance to make it invertible, at first; doubled until it is.
DAMP = 0.01
#: By how much (Frobenius norm) a covariance times its inverse may miss the identity.
INVERSE_ERROR = 0.05


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find out what ``init_lora_weights="corda"`` starts from, before the adapter is added.

    The covariance of a layer's inputs is the mean, over sequences, of ``XᵀX`` of the sequence ``X`` divided by its
    largest entry: every sequence counts alike, whatever batch it is in. Layers that are given the same tensor
    share one.

    A layer that is given a list of tokens (a mixture's) cannot tell sequences: there every call counts as one.

    Args:
        model: the base model. It may be cut by any engine; then every rank calls, with its share of the data.
        lora_config: its ``corda_config`` says how, and where files are kept. They are safetensors files; a pickle is
            refused.
        run_model: runs the model on the data. Not needed where a file has what it would find out.
        hooked_model: run in place of ``model``, with layers of the same names.

    Raises:
        ConfigError: ``run_model`` is missing, or a decomposition has not the rank that is wanted.
        AdapterError: ``run_model`` did not reach a layer, or its input or covariance is not finite.
        CheckpointError: a file is no safetensors file, or lacks a layer.
    """
    options = lora_config.corda_config or CordaConfig()
    targets = _targets(model, lora_config)
    if options.cache_file is not None and files.is_there(options.cache_file):
        cached = files.read(options.cache_file, "cache_file")
        for target in targets:
            _keep(target, {part: _cached(cached, name, options.cache_file) for part, name in _names(target)})
        return
    covariances = _covariances(model, targets, lora_config, options, run_model, hooked_model)
    made: dict[str, Tensor] = {}
    for target in tqdm(targets, desc="CorDA", disable=not (options.verbose and over_ranks.is_first())):
        found = _decomposed(target, covariances[target.name].float(), options)
        _keep(target, found)
        for part, name in _names(target):
            made |= {_key(name, letter): found[part][_LETTERS[letter]] for letter in _LETTERS}
        if not options.prune_temporary_fields:
            keep(target.base, target.op.weight_name, "inputs' covariance", {"": {"c": covariances[target.name]}})
    if options.cache_file is not None:
        stored = {key: tensor.T if key.endswith("V_WC") else tensor for key, tensor in made.items()}
        files.write(options.cache_file, stored, model)


#: PEFT's name of each tensor in a cache → ours. V is stored as ``[in, r]``.
_LETTERS = {"S": "s", "U": "u", "V": "v"}


def _key(name: str, letter: str) -> str:
    return f"{name}.eigens.{letter}_WC"


def _targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    return targets_of(make_plan(base_of(model), config))


def _names(target: Target) -> Iterator[tuple[str, str]]:
    """Yield the name of each projection in a layer (empty where none is fused), and its full name."""
    parent = target.name.rpartition(".")[0]
    for part, _, _ in target.op.parts(target.base):
        yield part, f"{parent}.{part}" if parent else part
    if not target.op.parts(target.base):
        yield "", target.name


def _keep(target: Target, found: Found) -> None:
    keep(target.base, target.op.weight_name, INITS["corda"].needs, found)


def _cached(cached: Mapping[str, Tensor], name: str, path: str) -> dict[str, Tensor]:
    try:
        u, s, v = (cached[_key(name, letter)] for letter in "USV")
    except KeyError as error:
        raise CheckpointError(f"cache_file={path!r} has no {error}: it was made for other targets") from None
    return {"u": u, "s": s, "v": v.T}


# ---- covariances ----------------------------------------------------------------------------------------------------


def _covariances(
    model: nn.Module,
    targets: list[Target],
    config: LoraConfig,
    options: CordaConfig,
    run_model: Callable[[], object] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """Return the covariance ``[in, in]`` of each target's inputs: from the file, or from a run."""
    path = options.covariance_file
    if path is not None and files.is_there(path):
        stored = files.read(path, "covariance_file")
        if missing := [target.name for target in targets if target.name not in stored]:
            raise CheckpointError(f"covariance_file={path!r} has no {missing[0]}: it was made for other targets")
        return {target.name: stored[target.name].to(_device(target)) for target in targets}
    if run_model is None:
        raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
    hooked = model if hooked_model is None else hooked_model
    run = _Run(targets if hooked_model is None else _targets(hooked, config), options)
    with mode(hooked, training=False), adapters_off(hooked), run.watch:
        run_model()
    found = {target.name: run.covariance(target.name) for target in targets}
    if path is not None:
        files.write(path, found, model)
    return found


def _device(target: Target) -> torch.device:
    weight: Tensor = getattr(target.base, target.op.weight_name)
    return weight.device


class _Run:
    """What one run of the model shows of the inputs of the targets."""

    def __init__(self, targets: list[Target], options: CordaConfig) -> None:
        self.watch = Watch(targets, self._record)
        self._targets = {target.name: target for target in targets}
        self._half = options.use_float16_for_covariance
        self._means: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._reduced: dict[str, Tensor] = {}

    def _record(self, target: Target, x: Tensor, y: Tensor) -> Tensor:
        if not self.watch.leads(target):
            return y
        x = over_ranks.whole_features(over_ranks.whole_tokens(x, target.site), target.site).detach().float()
        x = x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.unsqueeze(0)
        x = x / x.amax((1, 2), keepdim=True).abs()
        if not x.isfinite().all():
            raise AdapterError(f"{target.name}: an input is not finite, or has no positive entry; check the data")
        rows = x.flatten(0, 1)
        if target.name not in self._means:
            self._means[target.name] = torch.zeros(
                x.shape[2], x.shape[2], dtype=torch.float16 if self._half else torch.float32, device=x.device
            )
        count = self._counts.get(target.name, 0) + len(x)
        self._counts[target.name] = count
        # The mean, which half precision can hold, where a sum would soon be too large.
        mean = self._means[target.name]
        mean += (rows.T @ rows / count - mean * (len(x) / count)).to(mean.dtype)
        return y

    def covariance(self, name: str) -> Tensor:
        """Return the mean over the sequences of all ranks, the same on each of them.

        Raises:
            AdapterError: nothing was seen of the layer, or the result is not finite.
        """
        leader = self.watch.leader.get(name, name)
        if leader not in self._means:
            raise AdapterError(f"{name}: run_model did not reach this layer")
        if leader not in self._reduced:
            mean, site = self._means[leader], self._targets[leader].site
            if groups := over_ranks.data_groups(site):
                count = torch.tensor(float(self._counts[leader]), device=mean.device)
                total = over_ranks.summed(mean.float() * count, groups)
                mean = (total / over_ranks.summed(count, groups)).to(mean.dtype)
            if not mean.isfinite().all():
                raise AdapterError(f"{name}: the covariance of its inputs is not finite")
            self._reduced[leader] = over_ranks.agreed({"c": mean}, site)["c"]
        return self._reduced[leader]


# ---- decompositions -------------------------------------------------------------------------------------------------


def _decomposed(target: Target, covariance: Tensor, options: CordaConfig) -> Found:
    weight = logical_weight(target.op, target.base, target.site)
    fixed, parts = invertible(covariance.to(weight.device)), target.op.parts(target.base)
    rows = {name: weight[first:last] for name, first, last in parts} or {"": weight}
    decompose = partial(decomposed, covariance=fixed, r=target.spec.r, method=options.corda_method)
    try:
        found = {part: decompose(matrix.float()) for part, matrix in rows.items()}
    except ConfigError as error:
        raise ConfigError(f"{target.name}: {error}") from None
    return {part: over_ranks.agreed(tensors, target.site) for part, tensors in found.items()}


def invertible(covariance: Tensor) -> Tensor:
    """Return a covariance with as much of its mean diagonal added as makes its inverse good to
    :data:`INVERSE_ERROR` in float32 (the rule of the paper's code)."""
    eye, damp = torch.eye(len(covariance), device=covariance.device), DAMP
    scale = covariance.diagonal().mean()
    while True:
        fixed = covariance + eye * (scale * damp)
        inverse, info = torch.linalg.inv_ex(fixed)
        if int(info) == 0 and float(torch.dist(fixed @ inverse, eye)) < INVERSE_ERROR:
            return fixed
        if damp > 1e6:
            raise AdapterError("the covariance of a layer's inputs is zero")
        damp *= 2


def decomposed(weight: Tensor, covariance: Tensor, r: int, method: str) -> dict[str, Tensor]:
    """Return ``U``, ``S`` and ``V`` of the part of a weight that goes into the factors.

    ``W·C = U·S·Pᵀ`` and ``Vᵀ = Pᵀ·C⁻¹ = S⁻¹·Uᵀ·W``, for which no inverse is needed.

    Args:
        weight: ``[out, in]``.
        covariance: ``[in, in]``, invertible.
        r: how many triples.
        method: ``"ipm"``: those of the largest values; ``"kpm"``: those of the smallest.

    Returns:
        ``u [out, r]``, ``s [r]`` and ``v [r, in]``; the largest entry of each column of U is positive.

    Raises:
        ConfigError: the weight has fewer directions.
    """
    if r > min(weight.shape):
        raise ConfigError(f"a weight of {weight.shape[0]} × {weight.shape[1]} has no {r} directions; lower the rank")
    found = exact_svd(weight.double() @ covariance.double())
    chosen = slice(0, r) if method == "ipm" else slice(len(found.s) - r, None)
    u, s = found.u[:, chosen], found.s[chosen]
    inverse = torch.where(s > found.s[0] * 1e-14, 1 / s, torch.zeros_like(s))
    v = inverse.unsqueeze(1) * (u.T @ weight.double())
    return {"u": u.float().contiguous(), "s": s.float().contiguous(), "v": v.float().contiguous()}


__all__ = ["decomposed", "invertible", "preprocess_corda"]
