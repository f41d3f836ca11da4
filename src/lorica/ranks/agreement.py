"""Before the first step, all ranks compare what they are about to train."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica._version import __version__
from lorica.adapt.inject import base_of, lora_layers, switch_of
from lorica.checkpoint.names import Entry, adapter_entries
from lorica.engines import Engines
from lorica.engines.describe import DATA_AXES
from lorica.engines.rest import at_rest
from lorica.engines.site import Axis
from lorica.engines.stages import STAGES
from lorica.errors import LostRankError, RankError
from lorica.variants import VARIANTS, variant_of

#: Seconds within which every rank must have come to the comparison.
TIMEOUT = 300.0

_ABSENT = "nothing"
#: Numbers of a weight that ranks compare, about.
_SAMPLE = 4096
#: By what it is: the first rank that has it, and its value there.
_Seen = dict[tuple[str, ...], tuple[int, str]]


def verify(model: nn.Module, *, timeout: float = TIMEOUT, also: Mapping[str, Any] | None = None) -> None:
    """Compare configurations, names, shapes, placements and values of all adapters over all ranks.

    Of the weights that are adapted, ranks with the same part of one compare some numbers.

    Args:
        model: the adapted model.
        timeout: seconds after which a rank that did not come is an error on the others.
        also: what else has to be equal on all ranks, by name: a hash of the data, how many batches there are.

    Raises:
        RankError: on every rank: which rank differs in what, or could not say what it has.
        LostRankError: a rank did not come in time.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _wait_for_all(timeout)
    mine: dict[str, Any] = {"also": dict(also or {})}
    error: Exception | None = None
    try:
        mine |= _description(model)
    except Exception as caught:
        error, mine = caught, {"error": f"{type(caught).__name__}: {caught}"}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if error is not None:
        raise error
    _compare(everyone)
    if (switch := switch_of(model)) is not None:
        switch.agreed = True


def compare(everyone: Sequence[Mapping[str, Any]]) -> None:
    """See that all ranks have the same values by the same names.

    Args:
        everyone: what each rank has.

    Raises:
        RankError: names the first rank that differs from rank 0, and in what.
    """
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for field in sorted(first.keys() | other.keys()):
            wanted, got = first.get(field, _ABSENT), other.get(field, _ABSENT)
            if wanted != got:
                _refuse(rank, field, wanted, got)


def _wait_for_all(timeout: float) -> None:
    if dist.get_backend() != "gloo":
        return  # the process group's own timeout governs
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=timeout), wait_all_ranks=True)
    except RuntimeError as error:
        raise LostRankError(f"not all ranks came to compare their adapters within {timeout:g} s: {error}") from error


def _description(model: nn.Module) -> dict[str, Any]:
    configs = getattr(base_of(model), "peft_config", {})
    drawing = any(config.lora_dropout or VARIANTS[variant_of(config)].random for config in configs.values())
    axes = Engines(base_of(model)).axes
    return {
        "lorica": __version__,
        "configuration": {name: _fields(config) for name, config in configs.items()},
        "batch": [axes[name].rank for name in sorted(axes) if name in DATA_AXES],
        "layers": _layers(model, axes),
        "random state": _digest(torch.get_rng_state()) if drawing else "",
        "tensors": {
            f"{adapter}/{name}": _tensor(entry)
            for adapter, config in configs.items()
            for name, entry in adapter_entries(model, adapter, config).items()
            if not entry.tied
        },
        "weights": dict(_weights(model)),
    }


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield, for each weight of an adapted layer by name, which part of it is here and what some of its numbers are."""
    for layer in lora_layers(model):
        site = layer.site
        part = [] if site is None else [[cut.dim, cut.held[site.at[cut.axis]]] for cut in site.layout.cuts]
        apart = {} if site is None else {name: site.at[name] for name in site.apart}
        for name, parameter in layer.get_base_layer().named_parameters(recurse=False):
            held = at_rest(parameter.data, site)
            place = [part, apart, [str(side) for side in held.slices]]
            yield f"{layer.target_name}.{name}", (_text(place), sample(held.local))


def sample(weight: Tensor) -> str:
    """Return a hash of the shape, the dtype and some numbers of a weight, taken in even steps through all of it."""
    numbers = ""
    if type(weight) in (Tensor, nn.Parameter) and not weight.is_meta:  # quantisers' own cannot always be indexed
        flat = weight.detach() if weight.is_contiguous() else weight.detach()[:1].contiguous()
        numbers = _digest(flat.view(-1)[:: flat.numel() // _SAMPLE | 1])  # odd: not always the same columns
    return f"{tuple(weight.shape)} {weight.dtype} {numbers}"


def _layers(model: nn.Module, axes: Mapping[str, Axis]) -> dict[str, int]:
    """Return which of the model's layers are here: its coordinates on axes whose ranks have different ones."""
    apart = {name: site.axes[name].rank for layer in lora_layers(model) if (site := layer.site) for name in site.apart}
    return {name: axis.rank for name, axis in axes.items() if name == STAGES} | apart


def _fields(config: Any) -> dict[str, str]:
    return {field: _text(value) for field, value in config.to_dict().items()}


def _tensor(entry: Entry) -> dict[str, Any]:
    held = at_rest(entry.tensor.detach(), entry.site)
    site = entry.site
    place = [] if site is None else [site.layout.held(role, 0, site.at) for role in entry.roles]
    return {
        "shape": tuple(entry.shape),
        "dtype": str(entry.tensor.dtype),
        "layout": "" if site is None else _text(site.layout.to_dict()),
        "place": _text([place, [str(part) for part in held.slices]]),
        "values": _digest(held.local),
    }


def _compare(everyone: list[Mapping[str, Any]]) -> None:
    broken = [f"rank {rank}: {other['error']}" for rank, other in enumerate(everyone) if "error" in other]
    if broken:
        raise RankError(f"what ranks are about to train cannot be compared: {'; '.join(broken[:4])}")
    compare([{"version of lorica": other["lorica"]} for other in everyone])
    compare([{"names of the adapters": sorted(other["configuration"])} for other in everyone])
    for adapter in everyone[0]["configuration"]:
        named = f"of the configuration of adapter {adapter!r}"
        compare([{f"{k} {named}": v for k, v in other["configuration"][adapter].items()} for other in everyone])
    compare([other["also"] for other in everyone])
    _compare_random_states(everyone)
    _compare_names(everyone)
    _compare_weights(everyone)
    _compare_tensors(everyone)


def _compare_names(everyone: list[Mapping[str, Any]]) -> None:
    """See that ranks with the same layers train tensors of the same names."""
    known: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for rank, other in enumerate(everyone):
        of, tensors = known.setdefault(str(other["layers"]), (rank, other["tensors"]))
        if more := sorted(other["tensors"].keys() - tensors.keys()):
            _refuse(rank, "names of what trains", _ABSENT, more[0], of)
        if less := sorted(tensors.keys() - other["tensors"].keys()):
            _refuse(rank, "names of what trains", less[0], _ABSENT, of)


def _compare_tensors(everyone: list[Mapping[str, Any]]) -> None:
    seen: dict[str, tuple[int, dict[str, Any]]] = {}
    values: _Seen = {}
    for rank, other in enumerate(everyone):
        for name, tensor in other["tensors"].items():
            of, known = seen.setdefault(name, (rank, tensor))
            for field in ("shape", "dtype", "layout"):
                if tensor[field] != known[field]:
                    _refuse(rank, f"{field} of {name}", known[field], tensor[field], of)
            _see(values, (name, tensor["place"]), rank, tensor["values"], f"initial values of {name}")


def _compare_weights(everyone: list[Mapping[str, Any]]) -> None:
    seen: _Seen = {}
    for rank, other in enumerate(everyone):
        for name, (place, numbers) in other["weights"].items():
            _see(seen, (name, place), rank, numbers, f"base weights of {name}")


def _compare_random_states(everyone: list[Mapping[str, Any]]) -> None:
    # Masks of dropout, and a variant's samples, agree only where the generators do.
    field = "random state (dropout and sampling need the same one on all ranks that share a batch)"
    seen: _Seen = {}
    for rank, other in enumerate(everyone):
        _see(seen, (str(other["batch"]),), rank, other["random state"], field)


def _see(seen: _Seen, key: tuple[str, ...], rank: int, value: str, field: str) -> None:
    """Note what a rank has of something, and refuse it if one before has another."""
    holder, known = seen.setdefault(key, (rank, value))
    if value != known:
        _refuse(rank, field, known, value, holder)


def _refuse(rank: int, field: str, wanted: Any, got: Any, other: int = 0) -> None:
    raise RankError(
        f"rank {rank} differs from rank {other} in the {field}: {_short(got)}, not {_short(wanted)}. All ranks must "
        "have the same configuration, the same seed when the adapter is added, and files of the same content."
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=lambda item: sorted(item) if isinstance(item, set) else str(item))


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()
