"""Writing what Megatron Bridge loads: a distributed checkpoint of one process, chunk by chunk.

``LoRA`` has one pair on a fused layer, ``CanonicalLoRA`` one for each projection; both have one rank and one alpha for
all layers (``normalize_moe_lora``: experts have the rank divided by the experts of a token). What does not fit is
padded with zeros, and fused exactly (:mod:`lorica.convert.fuse`); ``conversion.json`` remembers it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorica.convert.adapter import Adapter, Lazy, Pair, is_alike, share_a
from lorica.convert.dcp import DistributedWriter
from lorica.convert.families import Place, in_megatron, in_transformers, slot_named
from lorica.convert.fuse import Fused, Layer, fuse, padded, scaled
from lorica.convert.geometry import Geometry, as_megatron
from lorica.convert.megatron import LATEST, RUN_CONFIG
from lorica.convert.scales import plain
from lorica.errors import ExportError
from lorica.files.atomic import write_bytes

_ITERATION = "iter_0000000"
FORMS = ("auto", "fused", "canonical")


class Named(NamedTuple):
    """A pair and its place.

    Attributes:
        place: the layer.
        part: which projection of a fused one; empty: all.
        pair: the factors.
    """

    place: Place
    part: str
    pair: Pair


def write_bridge_adapter(
    adapter: Adapter,
    folder: Path,
    geometry: Geometry | None,
    *,
    form: str = "auto",
    rank: int | None = None,
    rounding: bool = False,
) -> Fused:
    """Fill a directory with an adapter in Megatron Bridge's form.

    Args:
        adapter: the adapter.
        folder: the directory, which is there.
        geometry: of the model; ``ranks`` are those that are to load it, which only ``CanonicalLoRA``'s gate and up, and
            DoRA's magnitudes, depend on.
        form: ``"fused"`` for ``LoRA`` (and ``DoRA``), ``"canonical"`` for ``CanonicalLoRA``, ``"auto"`` for the first
            where the projections of every fused layer share their A, and else the second.
        rank: the largest rank of fused layers; None: nothing is lost.
        rounding: as in :func:`lorica.convert.fuse.scaled`.

    Returns:
        What was fused, and what that lost.

    Raises:
        ExportError: it cannot be written so.
    """
    if geometry is None:
        raise ExportError(
            f"{adapter.where}: Megatron's form needs the model's configuration; give it (model=, --model)"
        )
    for pair in adapter.pairs:
        if pair.lookup:
            raise ExportError(f"{pair.name}: Megatron Bridge adapts no embedding")
    form = _form(adapter, form, geometry)
    if form == "canonical":
        done = fuse(*_apart(adapter, geometry), rounding=rounding)
    else:
        done = fuse(adapter.pairs, lambda name: _layer_of(name, geometry), rank=rank, rounding=rounding)
    said = _one_configuration(done, geometry, rounding)
    named = [_named(pair, geometry) for pair in done.pairs]
    iteration = folder / _ITERATION
    iteration.mkdir()
    with DistributedWriter(iteration) as writer:
        numbered = not _everywhere(named, geometry)
        for one in named:
            _write(writer, one, geometry, numbered)
    sections = {"peft": _peft(adapter, form, said, named), "model": _model(adapter, geometry)}
    _write_yaml(iteration / RUN_CONFIG, sections)
    state = {"step": torch.tensor(0, dtype=torch.int32)}
    for path in (iteration / "train_state.pt", folder / "latest_train_state.pt"):
        torch.save(state, path)
    write_bytes(folder / LATEST, b"0")
    return done


# ---- form ------------------------------------------------------------------------------------------------------------


def _form(adapter: Adapter, form: str, geometry: Geometry) -> str:
    if form not in FORMS:
        raise ExportError(f"form={form!r}: expected one of {', '.join(FORMS)}")
    dora = any(pair.magnitude is not None for pair in adapter.pairs)
    if dora and form == "canonical":
        raise ExportError("Megatron Bridge has DoRA on fused layers only; form='fused' writes it so")
    if dora or form != "auto":
        return "fused" if dora else form
    bridge: Mapping[str, Any] = adapter.kept.get("bridge", {})
    if str(bridge.get("peft", {}).get("_target_", "")).endswith(".CanonicalLoRA"):
        return "canonical"
    if bridge.get("joined"):
        return "fused"
    return "fused" if all(_share(names, group) for names, group in _groups(adapter, geometry).items()) else "canonical"


def _groups(adapter: Adapter, geometry: Geometry) -> dict[tuple[str, ...], list[Pair]]:
    """Return the names of each layer of Megatron's → its pairs."""
    groups: dict[tuple[str, ...], list[Pair]] = {}
    for pair in adapter.pairs:
        groups.setdefault(_layer_of(pair.names[0], geometry).names, []).append(pair)
    return groups


def _share(names: tuple[str, ...], group: list[Pair]) -> bool:
    """Whether all projections of a layer have an adapter, with one A and one scale."""
    whole = sum(len(pair.names) for pair in group) == len(names)
    return whole and all(share_a(pair, group[0]) for pair in group[1:])


def _apart(adapter: Adapter, geometry: Geometry) -> tuple[list[Pair], Callable[[str], Layer]]:
    """Return pairs as ``CanonicalLoRA`` has them: one for each projection, but of experts that share their A.

    It keeps the first layer of grouped experts as it is; experts that are layers of their own it divides too.
    """
    whole: dict[str, Layer] = {}
    for names, group in _groups(adapter, geometry).items():
        if _is_routed(group[0], geometry) and _share(names, group):
            whole |= dict.fromkeys(names, Layer(names))
    return [single for pair in adapter.pairs for single in pair.split()], lambda name: whole.get(name, Layer((name,)))


def _layer_of(name: str, geometry: Geometry) -> Layer:
    place, _ = in_megatron(name, gated=geometry.gated)
    names = in_transformers(place, gated=geometry.gated)
    return Layer(names, geometry.qkv if len(names) == 3 else None)


def _named(pair: Pair, geometry: Geometry) -> Named:
    place, part = in_megatron(pair.names[0], gated=geometry.gated)
    slot = None if place.layer is None else slot_named(place.module, gated=geometry.gated)
    if slot is None or not slot.parts or len(pair.names) > 1:
        return Named(place, "", pair)
    return Named(place, slot.parts[part], pair)


def _one_configuration(done: Fused, geometry: Geometry, rounding: bool) -> dict[str, Any]:
    """Give pairs the ranks and the scale that one configuration can say, and return it."""
    routed = {pair.names: _is_routed(pair, geometry) for pair in done.pairs}
    dense, experts = ({p.rank for p in done.pairs if routed[p.names] is flag} for flag in (False, True))
    alphas = {_alpha(pair) for pair in done.pairs}
    if len(alphas) == 1 and len(dense) == len(experts) == 1 and geometry.top_k > 1:
        rank, inner = dense.pop(), experts.pop()
        if inner != rank and inner == rank // geometry.top_k and rank % geometry.top_k == 0:
            return {"dim": rank, "alpha": alphas.pop(), "normalize_moe_lora": True}
    rank = max(pair.rank for pair in done.pairs)
    scale = Counter(pair.scale for pair in done.pairs).most_common(1)[0][0]
    done.pairs = [padded(scaled(pair, scale, rounding=rounding), rank) for pair in done.pairs]
    return {"dim": rank, "alpha": plain(scale * rank), "normalize_moe_lora": False}


def _is_routed(pair: Pair, geometry: Geometry) -> bool:
    return in_megatron(pair.names[0], gated=geometry.gated)[0].expert is not None


def _alpha(pair: Pair) -> int | float:
    return plain(pair.scale * pair.rank)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _everywhere(named: Sequence[Named], geometry: Geometry) -> bool:
    """Whether all layers have the same modules. Megatron stacks layers where they do, and else gives them numbers."""
    layers: dict[tuple[str, str, str], set[int]] = {}
    for place, part, _ in named:
        if place.layer is not None:
            layers.setdefault((place.root, place.module, part), set()).add(place.layer)
    return all(len(found) == geometry.layers for found in layers.values())


def _write(writer: DistributedWriter, one: Named, geometry: Geometry, numbered: bool) -> None:
    place, part, pair = one
    lead: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    module = place.module
    if place.layer is not None and not place.layer < geometry.layers:
        raise ExportError(f"{', '.join(pair.names)}: the model has {geometry.layers} layers")
    if place.layer is not None and numbered:
        module = f"decoder.layers.{place.layer}.{module}"
    elif place.layer is not None:
        module, lead, shape = f"decoder.layers.{module}", (place.layer,), (geometry.layers,)
    if place.expert is not None:
        if not place.expert < geometry.experts:
            raise ExportError(f"{', '.join(pair.names)}: the model has {geometry.experts} experts")
        module = module.replace("mlp.experts.", "mlp.experts.experts.", 1)
        lead, shape = (*lead, place.expert), (*shape, geometry.experts)
    key = f"{place.root}{module}.adapter." + (f"adapter_{part}." if part else "")
    b, m = _fused_order(one, geometry)
    leaves = [("linear_in.weight", pair.a), ("linear_out.weight", b)]
    if m is not None:
        leaves.append(("weight_magnitude", m))
    for leaf, lazy in leaves:
        writer.write(f"{key}{leaf}", (*shape, *lazy.shape), lead, lazy.read())


def _fused_order(one: Named, geometry: Geometry) -> tuple[Lazy, Lazy | None]:
    """Return B and magnitude with their rows in Megatron's order."""
    pair = one.pair
    ranks = geometry.expert_ranks if one.place.expert is not None else geometry.ranks
    m = None if pair.magnitude is None else pair.magnitude.map(lambda t: t.reshape(-1), (pair.b.shape[0],))
    if one.part in ("gate", "up"):
        return halved(pair.b, ranks), m
    if len(pair.names) == 2:
        return pair.b, m and rank_by_rank(m, ranks)
    if len(pair.names) < 3:
        return pair.b, m
    order = geometry.interleaved()
    if pair.b.shape[0] != len(order):
        raise ExportError(f"{', '.join(pair.names)}: B has {pair.b.shape[0]} rows, the model {len(order)}")
    return pair.b.map(lambda t: t[order]), m and m.map(lambda t: t[order])


def halved(b: Lazy, ranks: int) -> Lazy:
    """Return the rows of gate (or up) as Megatron Bridge stores them; ``megatron.unhalved`` undoes it."""
    if ranks == 1:
        return b
    if b.shape[0] % (2 * ranks):
        raise ExportError(f"{b.shape[0]} rows of gate or up do not divide over {ranks} ranks and two halves")
    return b.map(lambda t: t.view(ranks, 2, -1, t.shape[-1]).transpose(0, 1).flatten(0, 2))


def rank_by_rank(magnitude: Lazy, ranks: int) -> Lazy:
    """Return a vector of gate and up rank by rank; ``megatron.by_halves`` undoes it."""
    if magnitude.shape[0] % (2 * ranks):
        raise ExportError(f"{magnitude.shape[0]} rows of gate and up do not divide over {ranks} ranks")
    return magnitude if ranks == 1 else magnitude.map(lambda t: t.view(2, ranks, -1).transpose(0, 1).flatten())


# ---- configuration ---------------------------------------------------------------------------------------------------


def _peft(adapter: Adapter, form: str, said: Mapping[str, Any], named: Sequence[Named]) -> dict[str, Any]:
    """Return the section of the run's configuration: what the adapter came with, brought up to date."""
    kept: Mapping[str, Any] = adapter.kept.get("bridge", {}).get("peft", {})
    dora = any(one.pair.magnitude is not None for one in named)
    name = "dora.DoRA" if dora else "lora.LoRA" if form == "fused" else "canonical_lora.CanonicalLoRA"
    made: dict[str, Any] = {
        "_target_": f"megatron.bridge.peft.{name}",
        "target_modules": sorted({name for one in named for name in _targets(one, form)}),
    }
    made |= {"dropout": float(adapter.config.get("lora_dropout") or 0.0)}
    made |= {"dropout_position": adapter.config.get("dropout_position", "pre")}
    result = made | dict(kept) | dict(said)
    if str(result["_target_"]).rpartition(".")[2] not in (name.rpartition(".")[2], f"VLM{name.rpartition('.')[2]}"):
        result |= {key: made[key] for key in ("_target_", "target_modules")}
    if any(one.place.expert is not None for one in named):
        result["share_expert_adapters"] = _wants_sharing(adapter) and _experts_share(named)
    return result


def _wants_sharing(adapter: Adapter) -> bool:
    kept = adapter.kept.get("bridge", {}).get("peft", {})
    return bool(kept.get("share_expert_adapters", adapter.config.get("share_expert_adapters", False)))


def _targets(one: Named, form: str) -> list[str]:
    leaf = one.place.module.rpartition(".")[2]
    if form == "canonical" and len(one.pair.names) > 1:
        return [f"{leaf}_gate", f"{leaf}_up"]
    if not one.part:
        return [leaf]
    return [f"linear_{one.part}" if leaf == "linear_qkv" else f"{leaf}_{one.part}"]


def _experts_share(named: Sequence[Named]) -> bool:
    first: dict[tuple[int | None, str, str], Pair] = {}
    for place, part, pair in named:
        if place.expert is not None:
            other = first.setdefault((place.layer, place.module, part), pair)
            if not is_alike(other, pair):
                return False
    return True


def _model(adapter: Adapter, geometry: Geometry) -> dict[str, Any]:
    kept: Mapping[str, Any] = adapter.kept.get("bridge", {}).get("model", {})
    return {**kept, **as_megatron(geometry)}


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    import yaml

    write_bytes(path, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).encode())


__all__ = ["FORMS", "write_bridge_adapter"]
