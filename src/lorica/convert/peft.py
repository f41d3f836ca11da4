"""PEFT's directories: ``adapter_model.safetensors`` and ``adapter_config.json``, in transformers' names or Megatron's.

Stacked experts (``…mlp.experts.lora_A.weight``, of PEFT's ``target_parameters``) are taken apart: one pair for each
expert, its gate and up together, since they are rows of one weight there.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.checkpoint import reading
from lorica.config import CONFIG_NAME
from lorica.config.lora import check_fields
from lorica.convert import families
from lorica.convert.adapter import Adapter, Lazy, Pair
from lorica.convert.fuse import apart
from lorica.convert.geometry import Geometry, known_geometry
from lorica.convert.record import read_record
from lorica.convert.scales import scale_of
from lorica.errors import CheckpointError, ExportError, naming, shown
from lorica.files.hub import find_file
from lorica.files.json import read_json_object
from lorica.files.tensors import TensorReader
from lorica.layout.specs import PREFIX
from lorica.targets.match import matches, pattern_value

_TENSOR = re.compile(
    r"(?P<owner>.+?)\.(?:lora_(?P<letter>[AB])\.weight|lora_embedding_(?P<lookup>[AB])|(?P<m>lora_magnitude_vector)(?:\.weight)?)"
)
STACK = "mlp.experts"
ROUTER = ".mlp.gate"
#: The stacked parameters of experts: name → the projections whose rows it has.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
#: Layers that some architectures keep fused: name → the projections whose rows it has.
WHOLE = {
    "self_attn.qkv_proj": tuple(f"self_attn.{letter}_proj" for letter in "qkv"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
#: What a configuration can say that pairs of factors do not: field → its value where it says nothing.
_BEYOND: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
Found = dict[str, dict[str, Lazy]]


def read_peft_adapter(path: str | os.PathLike[str], geometry: Geometry | None = None) -> Adapter:
    """Read a saved adapter as pairs under transformers' names.

    Args:
        path: its directory.
        geometry: of its model; needed for the number of experts that share a pair, and for fused q, k and v.

    Raises:
        CheckpointError: the file is broken, or holds what is no pair of factors.
        ConfigError: a field of the configuration has an impossible value.
        ExportError: the configuration says what pairs cannot hold; all such fields are named.
    """
    folder = Path(path)
    config = read_json_object(find_file(folder, CONFIG_NAME))
    _check(folder, config)
    check_fields(config, folder / CONFIG_NAME)
    reader = reading.open_weights(folder)
    found = _tensors(reader)
    record = read_record(folder)
    geometry = geometry or known_geometry(None, record, config)
    gated = geometry is None or geometry.gated
    on_megatron = any(families.from_lorica_on_megatron(name, gated=gated) for name in found)
    with naming(reader.path, CheckpointError):
        pairs = [*_pairs(found, config, geometry, on_megatron)]
    spelling = families.spelling_of(name for pair in pairs for name in pair.names)
    pairs = [pair.renamed(lambda name: families.respelled(name, spelling)) for pair in pairs]
    kept = {**record, "spelling": _spelling(found, spelling)}
    values = record.get("config") or (without_names(config) if on_megatron else config)
    return Adapter(str(folder), apart(pairs, record), values, kept)


def _pairs(found: Found, config: Mapping[str, Any], geometry: Geometry | None, on_megatron: bool) -> Iterator[Pair]:
    for name, parts in found.items():
        if name.endswith((STACK, f"{STACK}.base_layer")):
            yield from _stack(name, _stacked_parameter(name, found, config), parts, config, geometry)
        else:
            yield _pair(name, parts, config, geometry, on_megatron)


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        kind = shown(config["peft_type"])
        raise CheckpointError(f"{folder / CONFIG_NAME}: peft_type={kind!r}: an adapter of another kind than LORA")
    beyond = [
        f"{name}={shown(repr(config[name]))}" for name, nothing in _BEYOND.items() if config.get(name) not in nothing
    ]
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "mica")):
        beyond.append(f"init_lora_weights={start!r} (its start changed the base weights)")
    if beyond:
        raise ExportError(
            f"{folder / CONFIG_NAME}: other systems have no place for {', '.join(beyond)}; `lorica export --target "
            "peft` with --as-lora or --initial makes plain LoRA of some of them first"
        )


def _tensors(reader: TensorReader) -> Found:
    found: Found = defaultdict(dict)
    for key in reader.tensors:
        match = _TENSOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise CheckpointError(f"{reader.path}: {key} is no factor of a linear layer, an embedding or experts")
        stored = reader.tensors[key]
        lazy = Lazy(stored.shape, reader.dtype_of(key), partial(_read, reader, key))
        letter = match["letter"] or (f"embedding_{match['lookup']}" if match["lookup"] else "m")
        found[match["owner"]][letter] = lazy
    return dict(found)


def _read(reader: TensorReader, key: str) -> Tensor:
    tensor = reader.read(key)
    reading.check_finite({key: tensor}, str(reader.path))
    return tensor


def _pair(
    name: str, parts: Mapping[str, Lazy], config: Mapping[str, Any], geometry: Geometry | None, on_megatron: bool
) -> Pair:
    lookup = "embedding_A" in parts
    a, b = (parts.get(f"embedding_{letter}" if lookup else letter) for letter in "AB")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"{name}: no pair of two matrices; there is {sorted(parts)}")
    names, rows = _names(name, b.shape[0], geometry, on_megatron)
    bare = matches(config.get("target_parameters"), f"{name}.weight")
    rank = pattern_value(config.get("rank_pattern"), name, config.get("r", a.shape[0]))
    if a.shape[0] != rank and not (on_megatron and a.shape[0] % rank == 0):
        raise CheckpointError(f"{name}: A has {a.shape[0]} rows; {CONFIG_NAME} says r={rank} of it (r or rank_pattern)")
    if a.shape[0] != b.shape[1] and not on_megatron:
        raise CheckpointError(f"{name}: A {a.shape} and B {b.shape} are no pair on one rank")
    scale = scale_of(config, f"{name}.weight" if bare else name, a.shape[0])
    return Pair(names, rows, a, b, scale, lookup, parts.get("m"))


def _names(
    name: str, rows: int, geometry: Geometry | None, on_megatron: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the projections whose rows a layer has, and how many of each."""
    names: tuple[str, ...] | None = None
    if on_megatron:
        names = families.from_lorica_on_megatron(name, gated=geometry is None or geometry.gated)
        if names is None:
            raise ExportError(f"{name}: not known which of transformers' layers this is")
    for whole, inner in WHOLE.items():
        if name.endswith(f".{whole}"):
            names = tuple(name.removesuffix(whole) + part for part in inner)
    if names is None or len(names) == 1:
        return (name,) if names is None else names, (rows,)
    if len(names) == 2:
        return names, (rows // 2, rows - rows // 2)
    if geometry is None:
        if on_megatron:
            raise ExportError(f"{name}: q, k and v are one here; the model's configuration says how many rows each has")
        return (name,), (rows,)
    return names, geometry.qkv


# ---- stacked experts -------------------------------------------------------------------------------------------------


def _stacked_parameter(name: str, found: Found, config: Mapping[str, Any]) -> str:
    """Return which of the stacked parameters a pair belongs to: PEFT wraps one after the other around the module."""
    if name.endswith(".base_layer"):
        return "gate_up_proj"
    if f"{name}.base_layer" in found:
        return "down_proj"
    targets = config.get("target_parameters") or []
    known = {str(target).rpartition(".")[2] for target in targets} & STACKED.keys()
    if len(known) != 1:
        raise CheckpointError(f"{name}: which parameter this is, target_parameters={targets} do not say")
    return known.pop()


def _stack(
    name: str, parameter: str, parts: Mapping[str, Lazy], config: Mapping[str, Any], geometry: Geometry | None
) -> Iterator[Pair]:
    """Yield the pair of each expert: A is ``[E·r, in]``, B ``[out, r·E]`` with the experts in turn."""
    module = name.removesuffix(".base_layer")
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None or set(parts) != {"A", "B"} or len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"{name}: no pair of two matrices; there is {sorted(parts)}")
    shared = bool(config.get("share_expert_adapters"))
    experts = _count(name, f"{module}.{parameter}", a.shape[0], config, geometry, shared)
    rank = a.shape[0] if shared else a.shape[0] // experts
    if b.shape[1] != a.shape[0]:
        raise CheckpointError(f"{name}: A {a.shape} and B {b.shape} are no stack of {experts} pairs")
    rows = b.shape[0]
    inner = STACKED[parameter]
    counts = (rows,) if len(inner) == 1 else (rows // 2, rows - rows // 2)
    scale = scale_of(config, f"{module}.{parameter}", rank)
    for expert in range(experts):
        mine_a, mine_b = a, b
        if not shared:
            mine_a = a.rows(expert * rank, (expert + 1) * rank)
            mine_b = b.map(partial(_of_expert, (rows, rank, experts), expert), (rows, rank))
        yield Pair(tuple(f"{module}.{expert}.{leaf}" for leaf in inner), counts, mine_a, mine_b, scale)


def _of_expert(shape: tuple[int, int, int], expert: int, b: Tensor) -> Tensor:
    return b.view(shape)[:, :, expert].contiguous()


def _count(
    name: str, parameter: str, total: int, config: Mapping[str, Any], geometry: Geometry | None, shared: bool
) -> int:
    if geometry is not None and geometry.experts:
        experts = geometry.experts
    elif shared or config.get("normalize_moe_lora"):
        raise ExportError(f"{name}: the number of experts is not in the file; the model's configuration says it")
    else:
        experts = total // max(1, int(pattern_value(config.get("rank_pattern"), parameter, config["r"])))
    if experts < 1 or (not shared and total % experts):
        raise CheckpointError(f"{name}: {total} rows of A are not those of {experts} experts")
    return experts


# ---- what is kept ----------------------------------------------------------------------------------------------------


def _spelling(found: Found, names: str) -> dict[str, Any]:
    """Return how the file names things, where there is more than one way."""
    said: dict[str, Any] = {"names": names} if names else {}
    if any(name.endswith((STACK, f"{STACK}.base_layer")) for name in found):
        said["experts"] = "stacked"
    elif any(re.search(r"\.experts\.\d+\.", name) for name in found):
        said["experts"] = "separate"
    if whole := sorted({leaf for leaf in WHOLE for name in found if name.endswith(f".{leaf}")}):
        said["whole"] = whole
    return said


def without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the fields that name layers, which are Megatron's."""
    names = ("target_modules", "target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern")
    return {key: value for key, value in config.items() if key not in names}


__all__ = ["ROUTER", "STACK", "STACKED", "WHOLE", "read_peft_adapter", "without_names"]
