"""A call that can serve one adapter at a time, made for each adapter of a batch on its own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lorica.errors import AdapterError
from lorica.routing.rows import Rows

#: Gets an adapter's name and its rows of all arguments.
Call = Callable[..., Any]


def each_group(rows: Rows, names: Sequence[str], call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what ``call(name, …)`` returns for each adapter's rows, put together in the order of the batch.

    Tensors among the arguments whose first dimension is the batch's are divided, others are passed as they are.

    Args:
        rows: of the batch.
        names: for which a call is made, in this order; all that occur are among them. One that does not occur is called
            with the first item of the batch and its output dropped: other ranks may need this rank to take part.
        call: see :data:`Call`. Its output is a tensor or a structure of tensors with one or more items for each row.
        args: of the call; the first tensor among ``args`` and ``kwargs`` has the rows in its first dimension.
        kwargs: of the call.
    """
    leaves, _ = tree_flatten((tuple(args), dict(kwargs)))
    first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim())
    items, device = first.shape[0], first.device
    occurring = rows.adapters
    outputs, places = [], []
    for name in names:
        here = rows.places(name, items, device) if name in occurring else slice(0, 1)
        mine, named = tree_map(lambda leaf, here=here: _take(leaf, here, items), (tuple(args), dict(kwargs)))
        output = call(name, *mine, **named)
        if name in occurring:
            outputs.append(output)
            places.append(here)
    return outputs[0] if len(outputs) == 1 else _together(outputs, places, items, device)


def _take(leaf: Any, here: slice | Tensor, items: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != items:
        return leaf
    return leaf[here] if isinstance(here, slice) else leaf.index_select(0, here)


def _together(outputs: Sequence[Any], places: Sequence[slice | Tensor], items: int, device: torch.device) -> Any:
    flat = [tree_flatten(output) for output in outputs]
    everywhere = [torch.arange(items, device=device)[here] for here in places]
    counts = [len(here) for here in everywhere]
    back = torch.cat(everywhere).argsort()
    found = [_rejoin([leaves[i] for leaves, _ in flat], counts, back) for i in range(len(flat[0][0]))]
    return tree_unflatten(found, flat[0][1])


def _rejoin(parts: Sequence[Any], counts: Sequence[int], back: Tensor) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if any(not part.dim() or part.shape[0] % count for part, count in zip(parts, counts, strict=True)):
        raise AdapterError(
            f"adapter_names: an output {tuple(parts[0].shape)} of a call for {counts[0]} rows has no rows of its own, "
            "so the calls for several adapters cannot be put together"
        )
    # Several items of an output may belong to one of the input: [rows, tokens, …] in, [rows · tokens, …] out.
    shaped = [part.reshape(count, -1, *part.shape[1:]) for part, count in zip(parts, counts, strict=True)]
    return torch.cat(shaped).index_select(0, back).flatten(0, 1)


__all__ = ["each_group"]
