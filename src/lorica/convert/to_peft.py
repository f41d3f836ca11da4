"""Writing PEFT's directories, one tensor after the other."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorica.checkpoint.names import WEIGHTS_NAME
from lorica.config import CONFIG_NAME
from lorica.convert import families
from lorica.convert.adapter import Adapter, Lazy, Pair, Tensors, is_alike, tensors_of, zeros
from lorica.convert.fuse import Fused, Layer, fuse, padded, scaled
from lorica.convert.geometry import Geometry
from lorica.convert.peft import ROUTER, STACK, STACKED, WHOLE, without_names
from lorica.convert.scales import is_close, plain, scale_of
from lorica.errors import CheckpointError, ExportError
from lorica.files.atomic import write_json
from lorica.files.tensors import ORDER, Stored, TensorWriter
from lorica.layout.specs import PREFIX
from lorica.targets.match import matches, pattern_value

_EXPERT = re.compile(r"(?P<module>.+\.mlp\.experts)\.(?P<expert>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)")
_LAYER = re.compile(r"(?P<before>.+\.layers)\.(?P<layer>\d+)\.(?P<leaf>.+)")
#: Architectures whose layers are fused in transformers.
_WHOLE = {"phi3": [*WHOLE], "glm": ["mlp.gate_up_proj"], "glm4": ["mlp.gate_up_proj"]}


class Target(NamedTuple):
    """A layer of the file.

    Attributes:
        name: of a module, or of a stacked parameter.
        rank: of its factors.
        scale: of its delta.
        tensors: what the file has.
        bare: whether it is a parameter.
        shared: whether it is one pair for all experts of a stack.
    """

    name: str
    rank: int
    scale: float
    tensors: list[Tensors]
    bare: bool = False
    shared: bool = False


def write_peft_adapter(
    adapter: Adapter,
    folder: Path,
    geometry: Geometry | None = None,
    *,
    experts: str = "auto",
    names: str = "transformers",
    rank: int | None = None,
    rounding: bool = False,
) -> Fused:
    """Fill a directory with an adapter in PEFT's form.

    Args:
        adapter: the adapter.
        folder: the directory, which is there.
        geometry: of its model, where it is known.
        experts: ``"stacked"`` for the parameters of transformers ≥ 5, ``"separate"`` for a module for each expert,
            ``"auto"`` for what the adapter came from, or else stacked.
        names: ``"transformers"``, or ``"megatron"`` for the names by which lorica adapts Megatron's layers.
        rank: the largest rank of layers that have to be fused; None: nothing is lost.
        rounding: as in :func:`lorica.convert.fuse.scaled`.

    Returns:
        What was fused, and what that lost.

    Raises:
        ExportError: it cannot be written so.
    """
    done = Fused()
    if names == "megatron":
        gated = geometry is None or geometry.gated
        adapter = replace(adapter, config=without_names(adapter.config))
        singles = [single for pair in adapter.pairs for single in pair.split()]
        targets = targets_of(one.renamed(lambda name: families.on_megatron(name, gated=gated)) for one in singles)
    else:
        targets = _in_transformers(adapter, geometry, experts, done, rank, rounding)
    _write(folder / WEIGHTS_NAME, [tensor for target in targets for tensor in target.tensors])
    write_json(folder / CONFIG_NAME, config_of(adapter, targets, geometry))
    return done


def targets_of(pairs: Iterable[Pair]) -> list[Target]:
    """Return the layers of a file that has these pairs, each of one name."""
    return [Target(pair.name, pair.rank, pair.scale, tensors_of(pair)) for pair in pairs]


def _in_transformers(
    adapter: Adapter, geometry: Geometry | None, experts: str, done: Fused, rank: int | None, rounding: bool
) -> list[Target]:
    model_type = "" if geometry is None else geometry.model_type
    said: Mapping[str, Any] = adapter.kept.get("spelling", {})
    form = said.get("experts", "stacked") if experts == "auto" else experts
    whole = said.get("whole", _WHOLE.get(model_type, []))
    spelling = said.get("names", families.spelling_for(model_type))
    routed = [pair for pair in adapter.pairs if form == "stacked" and _EXPERT.fullmatch(pair.names[0])]
    mine = {id(pair) for pair in routed}
    rest = [pair for pair in adapter.pairs if id(pair) not in mine]
    fused = _whole_layers([pair for pair in rest if _whole_of(pair.names[0], whole)], whole, geometry, rank, rounding)
    alone = [s for pair in rest if not _whole_of(pair.names[0], whole) for s in pair.split()]
    alone += [_named_whole(pair, whole) for pair in fused.pairs]
    targets = targets_of(pair.renamed(lambda name: families.respelled(name, spelling, back=True)) for pair in alone)
    if form == "stacked":  # where experts are stacked, their router is a bare parameter too
        targets = [_bare(target) if target.name.endswith(ROUTER) else target for target in targets]
    stacks = fuse(routed, _expert_layer, rank=rank, rounding=rounding)
    targets += _stacks(stacks, geometry, rounding, shared=bool(adapter.config.get("share_expert_adapters")))
    for part in (fused, stacks):
        done.pairs += part.pairs
        done.blocks |= part.blocks
        done.errors |= part.errors
    return targets


def _bare(target: Target) -> Target:
    return target._replace(name=f"{target.name}.weight", bare=True)


# ---- fused layers ----------------------------------------------------------------------------------------------------


def _whole_of(name: str, whole: Iterable[str]) -> str | None:
    """Return the fused layer that a projection is part of, if there are such."""
    for leaf in whole:
        for part in WHOLE[leaf]:
            if name.endswith(f".{part}") and ".experts." not in name:
                return name.removesuffix(part) + leaf
    return None


def _whole_layers(
    pairs: list[Pair], whole: list[str], geometry: Geometry | None, rank: int | None, rounding: bool
) -> Fused:
    def layer_of(name: str) -> Layer:
        fused = _whole_of(name, whole)
        assert fused is not None
        leaf = next(leaf for leaf in whole if fused.endswith(f".{leaf}"))
        rows = geometry.qkv if geometry is not None and len(WHOLE[leaf]) == 3 else None
        return Layer(tuple(fused.removesuffix(leaf) + part for part in WHOLE[leaf]), rows)

    return fuse(pairs, layer_of, rank=rank, rounding=rounding)


def _named_whole(pair: Pair, whole: list[str]) -> Pair:
    name = _whole_of(pair.names[0], whole)
    assert name is not None
    return replace(pair, names=(name,), rows=(sum(pair.rows),))


# ---- stacked experts -------------------------------------------------------------------------------------------------


def _parameter(name: str) -> tuple[str, int, str]:
    """Return the module of stacked experts, the number of one, and the parameter that a projection is part of."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise ExportError(f"{name} is no projection of an expert")
    parameter = next(stack for stack, leaves in STACKED.items() if match["leaf"] in leaves)
    return match["module"], int(match["expert"]), parameter


def _expert_layer(name: str) -> Layer:
    module, expert, parameter = _parameter(name)
    return Layer(tuple(f"{module}.{expert}.{leaf}" for leaf in STACKED[parameter]))


def _stacks(fused: Fused, geometry: Geometry | None, rounding: bool, *, shared: bool) -> list[Target]:
    found: dict[str, dict[str, dict[int, Pair]]] = defaultdict(lambda: defaultdict(dict))
    for pair in fused.pairs:
        module, expert, parameter = _parameter(pair.names[0])
        found[module][parameter][expert] = pair
    fused.pairs = []
    targets = []
    for module, parameters in found.items():
        for parameter in (name for name in STACKED if name in parameters):
            there = parameters[parameter]
            inner = len(parameters) == 2 and parameter == "gate_up_proj"
            owner = f"{module}.base_layer" if inner else module
            one = there[min(there)]
            if shared and all(is_alike(pair, one) for pair in there.values()):
                named = tensors_of(replace(one, names=(owner,), rows=(sum(one.rows),)))
                fused.pairs += there.values()
                targets.append(Target(f"{module}.{parameter}", one.rank, one.scale, named, bare=True, shared=True))
            else:
                targets.append(_stack(module, parameter, owner, there, geometry, fused, rounding))
    return targets


def _stack(
    module: str,
    parameter: str,
    owner: str,
    there: Mapping[int, Pair],
    geometry: Geometry | None,
    fused: Fused,
    rounding: bool,
) -> Target:
    """Return one stacked parameter: A ``[E·r, in]``, B ``[out, r·E]`` with the experts in turn."""
    experts = max(max(there) + 1, 0 if geometry is None else geometry.experts)
    first = there[min(there)]
    rank = max(pair.rank for pair in there.values())
    nothing = replace(first, a=zeros(first.a.shape, first.a.dtype), b=zeros(first.b.shape, first.b.dtype))
    pairs = [padded(scaled(there.get(e, nothing), first.scale, rounding=rounding), rank) for e in range(experts)]
    if any(pair.magnitude is not None for pair in pairs):
        raise ExportError(f"{module}.{parameter}: PEFT has no DoRA on stacked experts")
    fused.pairs += [pair for e, pair in enumerate(pairs) if e in there]
    rows, columns = first.b.shape[0], first.a.shape[1]
    a = Lazy((experts * rank, columns), first.a.dtype, lambda: torch.cat([pair.a.read() for pair in pairs]))
    b = Lazy(
        (rows, rank * experts), first.b.dtype, lambda: torch.stack([pair.b.read() for pair in pairs], 2).flatten(1)
    )
    named = [Tensors(f"{PREFIX}{owner}.lora_{letter}.weight", value) for letter, value in (("A", a), ("B", b))]
    return Target(f"{module}.{parameter}", rank, first.scale, named, bare=True)


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(path: Path, tensors: list[Tensors]) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
        raise CheckpointError(f"{path}: two tensors would have the name {twice[0]}")
    stored = {name: Stored("", tuple(value.shape), 0, 0).of(value.dtype) for name, value in tensors}
    placed = sorted(tensors, key=lambda tensor: (ORDER.index(stored[tensor.name].word), tensor.name))
    with TensorWriter(path, {name: stored[name] for name, _ in placed}, {"format": "pt"}) as writer:
        for name, value in placed:
            writer.write(name, value.read().detach().cpu())


def config_of(adapter: Adapter, targets: list[Target], geometry: Geometry | None) -> dict[str, Any]:
    """Return the configuration: what the adapter came with, if it says what the factors are; else one that does."""
    config = dict(adapter.config)
    if says(config, targets, geometry):
        return config
    (rank, scale), _ = Counter((target.rank, target.scale) for target in targets).most_common(1)[0]
    alpha = plain(scale * rank)
    ranks = {_exactly(t.name): t.rank for t in targets if t.rank != rank}
    alphas = {
        _exactly(t.name): plain(t.scale * t.rank) for t in targets if not is_close(t.scale * t.rank, scale * rank)
    }
    bare = [target.name for target in targets if target.bare]
    modules = [target.name for target in targets if not target.bare]
    made: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": False}
    made |= {"rank_pattern": ranks, "alpha_pattern": alphas, "bias": "none", "inference_mode": True}
    made |= {
        "target_modules": _short(modules, geometry),
        "target_parameters": _short(bare, geometry, whole=True) or None,
    }
    made["use_dora"] = any(t.name.endswith("magnitude_vector") for target in targets for t in target.tensors)
    made["task_type"] = config.get("task_type") or "CAUSAL_LM"
    if geometry is not None and geometry.name and not config.get("base_model_name_or_path"):
        made["base_model_name_or_path"] = geometry.name
    shared = config.pop("share_expert_adapters", False)
    config.pop("normalize_moe_lora", None)
    if any(target.shared or (shared and ".local_experts." in target.name) for target in targets):
        made["share_expert_adapters"] = True
    return config | made


def says(config: Mapping[str, Any], targets: Iterable[Target], geometry: Geometry | None) -> bool:
    """Whether a configuration says of layers what they are: names, ranks and scales."""
    return all(_says(config, target, geometry) for target in targets)


def _says(config: Mapping[str, Any], target: Target, geometry: Geometry | None) -> bool:
    names = config.get("target_parameters" if target.bare else "target_modules")
    if not names or not (names == "all-linear" or matches(names, target.name)):
        return False
    rank = int(pattern_value(config.get("rank_pattern"), target.name, config.get("r", 0)))
    if f".{STACK}." in target.name:
        if bool(config.get("share_expert_adapters")) != target.shared:
            return False
        rank //= geometry.top_k if config.get("normalize_moe_lora") and geometry is not None else 1
    return rank == target.rank and is_close(scale_of(config, target.name, target.rank), target.scale)


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _short(names: list[str], geometry: Geometry | None, *, whole: bool = False) -> list[str]:
    """Return the ends of names that mean these layers; the names themselves where not every layer has them."""
    layers: dict[str, set[int]] = defaultdict(set)
    others, seen = [], set()
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None or re.search(r"\.\d+\.", match["leaf"]):
            others.append(name)
        else:
            layers[f"{match['before']}|{match['leaf']}"].add(int(match["layer"]))
            seen.add(int(match["layer"]))
    every = set(range(geometry.layers)) if geometry is not None else set(range(max(seen, default=-1) + 1))
    if any(found != every for found in layers.values()):
        return sorted(names)
    leaves = {key.partition("|")[2] for key in layers}
    short = {leaf if whole else leaf.rpartition(".")[2] for leaf in leaves}
    return sorted(short | set(others))


__all__ = ["Target", "config_of", "says", "targets_of", "write_peft_adapter"]
