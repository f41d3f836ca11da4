"""Before the first step, all ranks compare what they are about to train."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica._version import __version__
from lorica.adapt.inject import base_of, switch_of
from lorica.checkpoint.names import Entry, adapter_entries
from lorica.engines import Engines
from lorica.engines.describe import DATA_AXES
from lorica.engines.rest import at_rest
from lorica.errors import RankError
from lorica.variants import VARIANTS, variant_of

#: Seconds within which every rank must have come to the comparison.
TIMEOUT = 300.0


def verify(model: nn.Module, *, timeout: float = TIMEOUT) -> None:
    """Compare configurations, names, shapes, placements and values of all adapters over all ranks.

    Args:
        model: the adapted model.
        timeout: seconds after which a rank that did not come is an error on the others.

    Raises:
        RankError: on every rank: which rank differs in what, or which one did not answer.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _wait_for_all(timeout)
    mine = _description(model)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    _compare(everyone)
    if (switch := switch_of(model)) is not None:
        switch.agreed = True


def _wait_for_all(timeout: float) -> None:
    if dist.get_backend() != "gloo":
        return  # the process group's own timeout governs
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=timeout), wait_all_ranks=True)
    except RuntimeError as error:
        raise RankError(f"not all ranks came to compare their adapters within {timeout:g} s: {error}") from error


def _description(model: nn.Module) -> dict[str, Any]:
    configs = getattr(base_of(model), "peft_config", {})
    drawing = any(config.lora_dropout or VARIANTS[variant_of(config)].random for config in configs.values())
    axes = Engines(base_of(model)).axes
    return {
        "lorica": __version__,
        "configuration": {name: _text(config.to_dict()) for name, config in configs.items()},
        "batch": [axes[name].rank for name in sorted(axes) if name in DATA_AXES],
        "random state": _digest(torch.get_rng_state()) if drawing else "",
        "tensors": {
            f"{adapter}/{name}": _tensor(entry)
            for adapter, config in configs.items()
            for name, entry in adapter_entries(model, adapter, config).items()
            if not entry.tied
        },
    }


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
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for field in ("lorica", "configuration"):
            if other[field] != first[field]:
                _refuse(rank, field, first[field], other[field])
    _compare_random_states(everyone)
    seen: dict[str, tuple[int, dict[str, Any]]] = {}
    values: dict[tuple[str, str], tuple[int, str]] = {}
    for rank, other in enumerate(everyone):
        for name, tensor in other["tensors"].items():
            of, known = seen.setdefault(name, (rank, tensor))
            for field in ("shape", "dtype", "layout"):
                if tensor[field] != known[field]:
                    _refuse(rank, f"{field} of {name}", known[field], tensor[field], of)
            holder, digest = values.setdefault((name, tensor["place"]), (rank, tensor["values"]))
            if digest != tensor["values"]:
                _refuse(rank, f"initial values of {name}", digest, tensor["values"], holder)


def _compare_random_states(everyone: list[Mapping[str, Any]]) -> None:
    # Masks of dropout, and a variant's samples, agree only where the generators do.
    states: dict[str, tuple[int, str]] = {}
    for rank, other in enumerate(everyone):
        holder, state = states.setdefault(str(other["batch"]), (rank, other["random state"]))
        if state != other["random state"]:
            field = "random state (dropout and sampling need the same one on all ranks that share a batch)"
            _refuse(rank, field, state, other["random state"], holder)


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
