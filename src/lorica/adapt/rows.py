"""Putting in the rows of an embedding that train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.engines.names import submodule
from lorica.engines.rest import at_rest, storage_axes
from lorica.layers import Switch, TrainableTokensLayer, TrainableTokensWrapper
from lorica.targets.tokens import Tokens


@torch.no_grad()
def first_rows(tokens: Tokens, dtype: torch.dtype, *, on_meta: bool) -> Tensor:
    """Return what this rank has of the rows that an adapter starts with: those of the weight.

    Collective over the axes that divide the weight; ``[n, d]`` numbers are sent, nothing of the weight's size.

    Args:
        tokens: which rows of which module.
        dtype: of the result.
        on_meta: return them without values, to be filled from a file.
    """
    weight = getattr(tokens.base, tokens.op.weight_name).detach()
    held, site, roles = at_rest(weight, tokens.site), tokens.site, tokens.op.roles_weight
    rows = roles[0]
    count, width = weight.shape if site is None else (site.layout.sizes[rows], site.layout.sizes[roles[1]])
    if on_meta or held.local.is_meta:
        shape = [len(tokens.indices), width]
        mine = shape if site is None else site.layout.local_shape(("token", roles[1]), shape, site.at)
        return torch.empty(mine, dtype=dtype, device="meta")
    if site is None:
        return held.local[list(tokens.indices)].to(dtype, copy=True)
    # Every rank writes the elements it keeps into zeros; each element is kept once on the axes that are summed over.
    found = held.local.new_zeros(len(tokens.indices), width)
    (kept, columns), computed = held.slices, site.layout.boxes(roles, (count, width), site.at)
    for box in computed:
        _write(found, held.local, tokens.indices, box, kept.start or 0, columns.start or 0)
    cut = [site.axes[cut.axis] for cut in site.layout.cuts if cut.dim in roles]
    for axis in (*cut, *(axis for _, axis in storage_axes(weight, site))):
        dist.all_reduce(found, group=axis.group)
    return site.layout.take(found, ("token", roles[1]), site.at).to(dtype)


def _write(found: Tensor, local: Tensor, indices: Iterable[int], box: Any, first: int, left: int) -> None:
    """Write the rows that this rank keeps of one rectangle of the weight.

    Args:
        found: ``[n, d]``.
        local: what the rank keeps, from row ``first`` and column ``left`` of what it computes with.
        indices: the rows of the logical weight that are wanted.
        box: where the rectangle lies in what the rank computes with, and in the logical weight.
        first: first row that is kept.
        left: first column that is kept.
    """
    (my_rows, my_columns), (rows, columns) = box
    low, high = max(my_columns.start, left), min(my_columns.stop, left + local.shape[1])
    if low >= high:
        return
    shift = columns.start - my_columns.start
    for slot, token in enumerate(indices):
        place = token - rows.start + my_rows.start - first
        if rows.start <= token < rows.stop and 0 <= place < len(local):
            found[slot, low + shift : high + shift] = local[place, low - left : high - left]


def train_rows(
    model: nn.Module,
    planned: Iterable[Tokens],
    rows: Mapping[str, Tensor],
    adapter: str,
    switch: Switch,
    places: Any,
) -> None:
    """Put an adapter's rows into the model.

    Args:
        model: the base model.
        planned: which rows of which modules; those with rows of their own first.
        rows: what each starts with.
        adapter: whose.
        switch: the model's.
        places: where each module stands.
    """
    layers: dict[str, TrainableTokensLayer] = {}
    for tokens in planned:
        module = submodule(model, tokens.name)
        source = None if tokens.tied_to is None else layers[tokens.tied_to]
        if isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            if source is not None and layer.tied_adapter is None and not layer.token_indices:
                layer.follow(source)
        else:
            layer = TrainableTokensLayer(module, tokens.op, switch, tokens.name, tokens.site, source)
            wrapper = TrainableTokensWrapper(layer)
            wrapper.training = layer.training = module.training
            places.put(module, wrapper)
        if source is None:
            layer.add_adapter(adapter, tokens.indices, rows[tokens.name])
        layer.found(adapter)
        layers[tokens.name] = layer


__all__ = ["first_rows", "train_rows"]
