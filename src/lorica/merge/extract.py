"""The LoRA of a fully fine-tuned model against its base, from their files, one parameter of both at a time.

The change of each weight is decomposed, by a sketch (https://arxiv.org/abs/0909.4061) or exactly; its leading part
becomes the factors. How much of the change they explain is known for each layer, not estimated.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapt.inject import lora_layers
from lorica.checkpoint.names import WEIGHTS_NAME, adapter_entries
from lorica.combine import place
from lorica.config import LoraConfig
from lorica.errors import AdapterError, ConfigError
from lorica.files.atomic import complete_directory, write_tensors
from lorica.init import target_generator
from lorica.lowrank import Svd, columns_for, cut, exact_svd, rank_of_energy, sketched_svd
from lorica.merge.checkpoint import Checkpoint
from lorica.merge.stream import Progress
from lorica.model import get_peft_model
from lorica.ops import Op, op_of_parameter
from lorica.targets import make_plan
from lorica.targets.plan import Target

ADAPTER = "default"
_PREFIX = "base_model.model."
_CHUNK = 128 * 1024
#: The report that is written beside an extracted adapter.
REPORT = "extraction.json"


@dataclass(frozen=True)
class Wanted:
    """How much of the change the factors are to explain.

    Attributes:
        rank: of every layer's factors; None: as much as ``energy`` needs.
        energy: the share of a change's squared norm to be explained, above 0 and up to 1.
        most: the largest rank that ``energy`` may take; None: any.
        exact: decompose every change exactly.

    Raises:
        ConfigError: neither or both of ``rank`` and ``energy`` are given, or one is impossible.
    """

    rank: int | None = None
    energy: float | None = None
    most: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ConfigError("give either a rank or the share of the energy that is to be explained")
        for name in ("rank", "most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: a rank is a positive whole number")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy={self.energy}: a share is above 0 and at most 1")
        if self.most is not None and self.energy is None:
            raise ConfigError(f"most={self.most} limits the ranks that energy gives; give that, or the rank alone")

    @property
    def limit(self) -> float:
        """The largest rank."""
        return self.rank or self.most or math.inf


@dataclass(frozen=True)
class Change:
    """What became of one parameter that fine-tuning changed.

    Attributes:
        name: the parameter.
        change: ``‖W' - W‖ / ‖W‖`` (Frobenius norms; infinite where W is zero).
        rank: of its factors; 0: it has none.
        explained: the share of ``‖W' - W‖²`` that the adapter has: 1 where it is saved whole, 0 where it is left out.
    """

    name: str
    change: float
    rank: int
    explained: float

    @property
    def error(self) -> float:
        """``‖W' - W - ΔW‖ / ‖W' - W‖``."""
        return math.sqrt(max(0.0, 1 - self.explained))


@dataclass
class _Found:
    changes: list[Change] = field(default_factory=list)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    asked: frozenset[str] = frozenset()


@torch.no_grad()
def extract_files(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    wanted: Wanted,
    target_modules: str | Sequence[str] = "all-linear",
    target_parameters: Sequence[str] | None = None,
    whole: str | Sequence[str] = (),
    base_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    progress: Callable[[int], contextlib.AbstractContextManager[Progress]] | None = None,
) -> list[Change]:
    """Write the adapter that takes a base model to a fine-tuned one, as near as its ranks allow.

    In memory there are one parameter of both models and what its decomposition needs, and the factors. Sketched
    decompositions leave at most 1.003 times what exact ones would (:func:`lorica.lowrank.sketched_svd`).

    Args:
        base: directory of the base model, with safetensors files.
        tuned: directory of the same model after training.
        output: directory of the adapter; it must not be there.
        wanted: how much is to be explained.
        target_modules: layers that get factors, as in ``LoraConfig``.
        target_parameters: bare parameters that do; None: every stack of experts.
        whole: names of modules to save whole (as ``modules_to_save`` has them), or ``"changed"``: every module that
            changed and has no factors, and layers of which the largest rank explains less than is wanted. Biases of
            layers with factors are saved all together then.
        base_name: what the configuration calls the base model; None: ``base``.
        dtype: of the factors.
        device: where decompositions are computed.
        progress: given the number of elements to come, a context that is told how many were done.

    Returns:
        Every parameter that changed.

    Raises:
        NotFollowedError: a model has to be loaded to know its parameters; says why.
        CheckpointError: a file is broken, holds NaN, or is not of the same model.
        AdapterError: nothing changed, or nothing that the adapter could have.
        TargetError: the targets do not fit the model.
        FileExistsError: ``output`` is there.
    """
    if Path(output).exists():
        raise FileExistsError(f"{output} already exists; choose another directory")
    device = device or torch.device("cpu")
    before, after = Checkpoint(base), Checkpoint(tuned)
    _check_same(before, after)
    stacks = _stacks(before.model) if target_parameters is None else list(target_parameters)
    names: Any = target_modules if isinstance(target_modules, str) else set(target_modules)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=names, target_parameters=stacks or None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it is set right here
        plan = make_plan(before.model, config)
    config.fan_in_fan_out = plan.fan_in_fan_out
    targets = {_parameter(target): target for target in plan.targets}
    asked = frozenset(() if isinstance(whole, str) else whole)
    found = _Found(whole=set(asked), asked=asked)
    parameters = before.parameters
    with progress(sum(p.numel() for p in parameters.values())) if progress else contextlib.nullcontext(None) as tell:
        for name in parameters:
            _look_at(name, before, after, targets.get(name), wanted, found, device, changed=whole == "changed")
            if tell is not None:
                tell(before.size(name))
    if not found.changes:
        raise AdapterError(f"{tuned} has the same weights as {base}: there is nothing to extract")
    config = _config(before, config, targets, found, wanted, base_name or str(base))
    changes = [replace(c, explained=1.0) if c.rank == 0 and _is_whole(c.name, config) else c for c in found.changes]
    if not found.factors and not config.modules_to_save:
        raise AdapterError(f"no target of {target_modules!r} changed; these did: {[c.name for c in changes][:10]}")
    with complete_directory(output, marker=False) as directory:
        tensors = _tensors(before.model, after, config, found, dtype)
        write_tensors(directory / WEIGHTS_NAME, tensors, {"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(directory)
        report = [{**asdict(change), "error": change.error} for change in changes]
        (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return changes


def _check_same(before: Checkpoint, after: Checkpoint) -> None:
    one, other = ({n: tuple(p.shape) for n, p in side.parameters.items()} for side in (before, after))
    for name in [*one, *other]:
        if one.get(name) != other.get(name):
            raise AdapterError(
                f"{name}: {one.get(name, 'missing')} in {before.directory}, {other.get(name, 'missing')} in "
                f"{after.directory}; an adapter cannot change a model's shape"
            )
    for side in (before, after):
        side.need(one)


def _stacks(model: nn.Module) -> list[str]:
    found = []
    for owner, module in model.named_modules():
        for name, parameter in module._parameters.items():
            op = op_of_parameter(module, name) if parameter is not None and parameter.dim() == 3 else None
            if op is not None and "expert" in op.roles_weight:
                found.append(f"{owner}.{name}")
    return found


def _parameter(target: Target) -> str:
    weight = target.op.weight_name
    return target.name if target.name.endswith(f".{weight}") else f"{target.name}.{weight}"


# ---- one parameter ---------------------------------------------------------------------------------------------------


def _look_at(
    name: str,
    before: Checkpoint,
    after: Checkpoint,
    target: Target | None,
    wanted: Wanted,
    found: _Found,
    device: torch.device,
    *,
    changed: bool,
) -> None:
    old, new = before.read(name, device), after.read(name, device)
    delta = new.sub_(old)
    squares = _norm(delta) ** 2
    if squares == 0:
        return
    size = _norm(old)
    change = math.sqrt(squares) / size if size else math.inf
    del old, new
    owner = name.rpartition(".")[0]
    if target is None or _is_named(owner, found.asked):
        if changed:
            found.whole.add(owner)
        found.changes.append(Change(name, change, 0, 0.0))
        return
    matrix = matrix_of(target.op, delta)
    decomposed, explained = _decomposed(name, matrix, squares, wanted)
    rank = decomposed.s.shape[-1]
    missed = wanted.energy is not None and explained < wanted.energy * (1 - 1e-6)
    if changed and missed and matrix.dim() == 2:
        found.whole.add(owner)
        found.changes.append(Change(name, change, 0, 0.0))
        return
    found.changes.append(Change(name, change, rank, explained))
    found.ranks[name] = rank
    root = decomposed.s.sqrt()
    a, b = root.unsqueeze(-1) * decomposed.v, decomposed.u * root.unsqueeze(-2)
    found.factors[name] = (a.cpu(), b.cpu())


def _norm(values: Tensor) -> float:
    """Return the Frobenius norm, summed in float64 without a copy in it."""
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(values.flatten(), _CHUNK)]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def matrix_of(op: Op, weight: Tensor) -> Tensor:
    """Return a weight as the matrix ``[…, out, in]`` that ``B·A`` is to be."""
    if op.lookup:
        return weight.T
    weight = op.orient(weight)
    return weight if op.roles_weight[0] == "expert" else weight.flatten(1)


def _decomposed(name: str, matrix: Tensor, squares: float, wanted: Wanted) -> tuple[Svd, float]:
    """Return the leading part of a change, and the share of its squared norm that it has."""
    out_features, in_features = matrix.shape[-2:]
    side = min(out_features, in_features)
    most = int(min(wanted.limit, side))
    rank = wanted.rank or min(8, most)
    # A basis of more than half of all directions costs what all of them cost.
    while not wanted.exact and 2 * columns_for(rank) <= side:
        found = sketched_svd(matrix, rank, target_generator(0, name))
        explained = _share(found.s, squares)
        if wanted.energy is None or rank == most or explained >= wanted.energy:
            break
        rank = min(2 * rank, most)
    else:
        found = exact_svd(matrix)
        squares = _norm(found.s) ** 2  # the same to within float32, of which a share of 1 would see the difference
    if wanted.energy is not None:
        rank = min(_rank_of_stack(found.s, wanted.energy, matrix), most)
    found = cut(found, rank)
    return found, _share(found.s, squares)


def _share(s: Tensor, squares: float) -> float:
    return min(1.0, _norm(s) ** 2 / squares)


def _rank_of_stack(s: Tensor, energy: float, matrix: Tensor) -> int:
    complete = s.shape[-1] == min(matrix.shape[-2:])
    ranks = []
    for values, one in zip(s.reshape(-1, s.shape[-1]), matrix.reshape(-1, *matrix.shape[-2:]), strict=True):
        total = (_norm(values if complete else one)) ** 2
        ranks.append(rank_of_energy(values, energy, total) if total else 1)
    return max(ranks)


# ---- the adapter -----------------------------------------------------------------------------------------------------


def _is_named(module: str, names: Collection[str]) -> bool:
    return any(module.endswith(name) for name in names)


def _is_whole(name: str, config: LoraConfig) -> bool:
    owner, _, leaf = name.rpartition(".")
    return _is_named(owner, set(config.modules_to_save or ())) or (config.bias == "all" and leaf == "bias")


def _config(
    before: Checkpoint,
    start: LoraConfig,
    targets: dict[str, Target],
    found: _Found,
    wanted: Wanted,
    base_name: str,
) -> LoraConfig:
    """Return the configuration whose targets are the parameters that have factors."""
    owners = {targets[name].name: rank for name, rank in found.ranks.items()}
    stacks = sorted(name for name in owners if name in found.factors)
    layers = {name.rpartition(".")[0] for name in found.factors if name not in stacks}
    biases = bool(found.whole & layers)  # of a layer that has factors only its bias can be saved
    whole = sorted(found.whole - layers - {name.rpartition(".")[0] for name in stacks})
    general = wanted.rank or max(owners.values(), default=1)
    own = {name: rank for name, rank in owners.items() if rank != general}
    tied = any(before.shared(name) for name in found.factors) or any(
        before.shared(change.name) and _is_named(change.name.rpartition(".")[0], set(whole)) for change in found.changes
    )
    config = replace(
        start,
        r=general,
        lora_alpha=general,
        target_modules=start.target_modules if len(stacks) < len(owners) else set(),
        rank_pattern=own,
        alpha_pattern=dict(own),
        target_parameters=stacks or None,
        modules_to_save=whole or None,
        bias="all" if biases else "none",
        ensure_weight_tying=tied,
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
    )
    return place.fitted(before.model, config, set(owners))


def _tensors(model: Any, after: Checkpoint, config: LoraConfig, found: _Found, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the adapter's file."""
    wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    values: dict[int, Tensor] = {}
    for layer in lora_layers(wrapped):
        if ADAPTER in layer.specs and ADAPTER not in layer.tied:
            name, weight = layer.target_name, layer.op.weight_name
            a, b = found.factors[name if name.endswith(f".{weight}") else f"{name}.{weight}"]
            factors = layer.factors(ADAPTER)
            values[id(factors.a)] = a.reshape(factors.a.shape).to(dtype)
            values[id(factors.b)] = b.reshape(factors.b.shape).to(dtype)
    result = {}
    for key, entry in adapter_entries(wrapped, ADAPTER, wrapped.peft_config[ADAPTER]).items():
        if id(entry.tensor) in values:
            result[key] = entry.saved(values[id(entry.tensor)]).contiguous()
        elif not entry.tied:
            name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
            result[key] = after.read(name, torch.device("cpu")).to(entry.tensor.dtype)
    return result


__all__ = ["REPORT", "Change", "Wanted", "extract_files"]
