"""Rows of an embedding, or of the head that shares its weight, that train for a few tokens.

::

        ids ── E[ids] ──── the trained row where the token is one of them ──── y
        x ─── x Wᵀ ─────── + x (D − W[tokens])ᵀ in the tokens' columns ─────── y

The rows are kept apart from the weight, ``D: [n, d]``; nothing of the weight's size is made in a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.engines.kinds import is_distributed
from lorica.engines.rest import at_rest, unshard
from lorica.engines.site import Site, localise
from lorica.errors import AdapterError, LayoutError
from lorica.layers.layer import LoraLayer
from lorica.layers.switch import Switch
from lorica.layout import Roles
from lorica.ops import Op
from lorica.ops.base import autocast_off


class Found(NamedTuple):
    """Those tokens of an adapter whose rows this rank computes with.

    Attributes:
        ids: the tokens, rising.
        rows: their rows in what this rank has of the weight.
        slots: their rows in ``D``.
        padding: the row in ``D`` of the padding token, which gets no gradient.
    """

    ids: Tensor
    rows: Tensor
    slots: Tensor
    padding: int | None

    def to(self, device: torch.device) -> Found:
        """Return the same on a device."""
        if self.ids.device == device:
            return self
        return Found(self.ids.to(device), self.rows.to(device), self.slots.to(device), self.padding)


class TrainableTokensLayer(nn.Module):
    """The trained rows of one module, of any number of adapters.

    Args:
        base_layer: the module, or the adapted layer around it.
        op: its mathematics: a lookup or a product.
        switch: which adapters are on, shared with the other layers of the model.
        target_name: full name of the module in the base model, for messages.
        site: where it lies among the ranks; None on one process.
        source: the layer whose rows these are, on a module with the same weight.

    Attributes:
        token_indices: the tokens of each adapter, in the order of the rows of ``D``.
        merged_adapters: adapters whose rows are in the weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        op: Op,
        switch: Switch,
        target_name: str,
        site: Site | None = None,
        source: TrainableTokensLayer | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.op = op
        self.switch = switch
        self.target_name = target_name
        self.site: Site | None = None
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, tuple[int, ...]] = {}
        self.merged_adapters: list[str] = []
        self._sources: list[TrainableTokensLayer] = []  # in a list, so as not to be a module of this one's
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._found: dict[str, Found] = {}
        self._untied_from: list[nn.Parameter] = []
        if source is not None:
            self.follow(source)
        self.settle(site)

    def follow(self, source: TrainableTokensLayer) -> None:
        """Have the rows of another layer from now on."""
        self._sources = [source]
        self.trainable_tokens_delta = source.trainable_tokens_delta
        self.token_indices = source.token_indices

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows these are."""
        return self._sources[0] if self._sources else None

    def settle(self, site: Site | None) -> None:
        """Take the place among the ranks that ``site`` describes; the rows are not touched."""
        self.leave()
        self._found.clear()
        self.site = site
        if site is not None and site.opening is not None:
            site.opening.put(partial(self._around, site.opening))

    def leave(self) -> None:
        """Give the base layer its own forward back."""
        if self.site is not None and self.site.opening is not None:
            self.site.opening.close()
        self.site = None

    def _get_name(self) -> str:
        return "TrainableTokensLayer"

    # ---- adapters -------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, tokens: Sequence[int], rows: Tensor) -> None:
        """Take in an adapter; ``rows [n, d]`` become a parameter as they are."""
        if self.tied_adapter is None:
            self.token_indices[name] = tuple(tokens)
            self.trainable_tokens_delta[name] = nn.Parameter(rows)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; one that is not there is no error."""
        self.token_indices.pop(name, None)
        self._found.pop(name, None)
        if name in self.trainable_tokens_delta:
            del self.trainable_tokens_delta[name]

    @property
    def roles(self) -> Roles:
        """The role of each dimension of ``D``."""
        return ("token", self.op.roles_weight[1])

    @property
    def bare(self) -> nn.Module:
        """The module of the base model."""
        base = self.base_layer
        return base.get_base_layer() if isinstance(base, LoraLayer) else base

    def running(self) -> list[str]:
        """Return the adapters that take part in a forward."""
        if not self.switch.enabled:
            if self.merged_adapters:
                with self.switch.turns.alone(self):  # of several threads the first one unmerges
                    self.unmerge()
            return []
        rows = self.switch.rows
        active: Iterable[str] = self.switch.active
        if rows is not None and rows.names is not None:
            if self.merged_adapters:
                raise AdapterError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                    f"({self.target_name}: {self.merged_adapters})"
                )
            active = rows.adapters
        return [name for name in active if name in self.token_indices and name not in self.merged_adapters]

    # ---- forward --------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's output with the rows of the running adapters in place."""
        if self.site is not None and self.site.opening is not None:
            return self.base_layer(*args, **kwargs)  # whose engine calls _around, between its collectives
        weight = self.bare._parameters.get(self.op.weight_name)
        if self.site is None and self.training and is_distributed(weight):
            raise LayoutError(
                f"{self.target_name}: the model was cut after the adapter was added; cut it inside "
                "`with lorica.parallel.cutting(model) as base:`, so that the adapter is cut with it"
            )
        return self._around(None, *args, **kwargs)

    def _around(self, opening: Any, *args: Any, **kwargs: Any) -> Any:
        base: Callable[..., Any] = self.base_layer if opening is None else opening.original
        names = self.running()
        y = base(*args, **kwargs)
        if not names:
            return y
        x = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
        back = None
        if self.site is not None:
            x, y, back = localise(self.site, x, y)
        with autocast_off(x.device.type):
            for name in names:
                y = self._in_place(name, x, y)
        y = y if back is None else back(y)
        if self.site is not None and y.requires_grad:
            y.register_hook(self.switch.gradients_changed)
        return y

    def _in_place(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        found = self.found(name).to(x.device)
        delta: Tensor = self.trainable_tokens_delta[name]
        if not len(found.ids):  # all ranks' outputs require a gradient, or none, since its way back is collective
            return y + delta[:0].sum().to(y.dtype)
        mine = self._items(name, x)
        return self._look_up(x, y, delta, found, mine) if self.op.lookup else self._add(x, y, delta, found, mine)

    def _look_up(self, ids: Tensor, y: Tensor, delta: Tensor, found: Found, mine: Tensor | None) -> Tensor:
        base: Any = self.bare
        place = torch.searchsorted(found.ids, ids).clamp_(max=len(found.ids) - 1)
        here = found.ids[place] == ids
        if mine is not None:
            here = here & mine.view(-1, *[1] * (ids.dim() - 1))
        rows = F.embedding(found.slots[place], delta.to(y.dtype), found.padding)
        if (scale := getattr(base, "embed_scale", None)) is not None:
            rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(here.unsqueeze(-1), rows, y)

    def _add(self, x: Tensor, y: Tensor, delta: Tensor, found: Found, mine: Tensor | None) -> Tensor:
        base: Any = self.bare
        weight = base.weight.detach()
        local = weight.to_local() if is_distributed(weight) else weight
        # The difference, not the row: what has not learned yet adds zeros, and the gradient of y passes as it is.
        difference = (delta[found.slots] - local[found.rows].to(delta.dtype)).to(y.dtype)
        part = F.linear(x.to(y.dtype), difference)
        if mine is not None:
            part = part * mine.view(-1, *[1] * (part.dim() - 1))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.index_add(y, -1, found.rows, part)
        y.index_add_(-1, found.rows, part)
        return y

    def _items(self, name: str, x: Tensor) -> Tensor | None:
        """Return which items of the batch have an adapter, where rows have adapters of their own."""
        rows = self.switch.rows
        if rows is None or rows.names is None:
            return None
        mine = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        mine[rows.index((name,), len(x), x.device)] = True
        return mine

    def found(self, name: str) -> Found:
        """Return the tokens of an adapter whose rows this rank computes with."""
        if name not in self._found:
            tokens = torch.tensor(self.token_indices[name], dtype=torch.long)
            ids, slots = tokens.sort()
            rows = ids.clone()
            if self.site is not None:
                layout, role, place = self.site.layout, self.op.roles_weight[0], 0
                held = torch.zeros_like(ids, dtype=torch.bool)
                for start, stop in layout.held(role, layout.sizes[role], self.site.at):
                    here = (ids >= start) & (ids < stop)
                    rows = torch.where(here, ids - start + place, rows)
                    held |= here
                    place += stop - start
                ids, rows, slots = ids[held], rows[held], slots[held]
            self._found[name] = Found(ids, rows, slots, self._padding(ids, slots))
        device = self.bare._parameters[self.op.weight_name].device  # type: ignore[union-attr]
        if device.type != "meta":
            self._found[name] = self._found[name].to(device)
        return self._found[name]

    def _padding(self, ids: Tensor, slots: Tensor) -> int | None:
        base: Any = self.bare
        padding = getattr(base, "padding_idx", None)
        if padding is None:
            return None
        at = ids == padding
        return int(slots[at]) if at.any() else None

    # ---- merging --------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether any adapter's rows are in the weight."""
        return bool(self.merged_adapters)

    def mergeable(self, names: Iterable[str]) -> list[str]:
        """Return those adapters of ``names`` that this layer has and that are not merged yet."""
        return [name for name in names if name in self.token_indices and name not in self.merged_adapters]

    def check_merge(self, names: Iterable[str], *, finite: bool) -> None:
        """Refuse a merge that cannot be done, before anything is touched.

        Raises:
            AdapterError: two adapters have a row of one token, or a row is not finite (``finite``).
        """
        names = self.mergeable(names)
        self.check_apart([*self.merged_adapters, *names])
        for name in names:
            if finite and not unshard(self.trainable_tokens_delta[name].detach()).isfinite().all():
                raise AdapterError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken ({self.target_name})"
                )

    def check_apart(self, names: Iterable[str]) -> None:
        """Refuse adapters that have a row of the same token.

        Raises:
            AdapterError: names the adapter and the tokens.
        """
        taken: set[int] = set()
        for name in dict.fromkeys(names):
            tokens = set(self.token_indices.get(name, ()))
            if twice := sorted(taken & tokens):
                raise AdapterError(
                    f"Token indices of adapter {name} are already defined and would result in undefined merging "
                    f"behavior. Only disjunct token indices are currently supported. ({self.target_name}: {twice[:5]})"
                )
            taken |= tokens

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write the rows of adapters into the weight; what was there is kept.

        Args:
            safe_merge: look for NaN and infinity before the weight is touched.
            adapter_names: which adapters; None: the active ones.

        Raises:
            AdapterError: see :meth:`check_merge`.
        """
        names = self.mergeable(self.switch.active if adapter_names is None else adapter_names)
        self.check_merge(names, finite=safe_merge)
        for name in names:
            if not self._shares_memory(name):
                local, rows, values = self._rows_at_rest(name)
                self._before[name] = (rows, local[rows].clone())
                local[rows] = values.to(local)
            self.merged_adapters.append(name)

    def _shares_memory(self, name: str) -> bool:
        """Whether the source has written the rows into this very weight."""
        source = self.tied_adapter
        return source is not None and self._weight().data_ptr() == source._weight().data_ptr()

    def _weight(self) -> Tensor:
        weight: Tensor = self.bare._parameters[self.op.weight_name]  # type: ignore[assignment]
        return at_rest(weight.data).local

    def _rows_at_rest(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return what this rank keeps of the weight, which of its rows change, and to what."""
        weight: Tensor = self.bare._parameters[self.op.weight_name]  # type: ignore[assignment]
        held = at_rest(weight.data, self.site)
        found, (kept, columns) = self.found(name), held.slices
        first = kept.start or 0
        here = (found.rows >= first) & (found.rows < first + len(held.local))
        values = unshard(self.trainable_tokens_delta[name].detach())[found.slots[here]][:, columns]
        return held.local, found.rows[here] - first, values

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight's own rows back, bit for bit."""
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            if name in self._before:
                rows, values = self._before.pop(name)
                self._weight()[rows] = values
            self.merged_adapters.pop()  # not before the rows are there: another thread may be looking

    def give_own_weight(self) -> None:
        """Replace a weight that another module shares with a copy, and remember the shared one."""
        module: Any = self.bare
        self._untied_from = [module.weight]
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)

    @property
    def untied_from(self) -> nn.Parameter | None:
        """The weight that the module shared with another before a merge gave it its own."""
        return self._untied_from[0] if self._untied_from else None

    def take_shared_weight(self) -> None:
        """Undo :meth:`give_own_weight`."""
        self.bare.weight = self._untied_from.pop()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return a copy of the weight with the rows of the running adapters, attached to the graph."""
        weight: Tensor = self.bare._parameters[self.op.weight_name]  # type: ignore[assignment]
        with torch.enable_grad():
            for name in self.running():
                found = self.found(name)
                rows = self.trainable_tokens_delta[name][found.slots].to(weight.dtype)
                weight = weight.index_copy(0, found.rows, rows)
        return weight


class TrainableTokensWrapper(nn.Module):
    """Stands in the place of a module of which rows train; what is not found here is looked up in that module.

    ``weight`` is the weight with the trained rows in place, since some models compute with it: a copy for who asks.
    """

    def __init__(self, token_adapter: TrainableTokensLayer) -> None:
        super().__init__()
        self.token_adapter = token_adapter

    def __getattr__(self, name: str) -> Any:
        """Look in the base layer for what this module does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("token_adapter")
            if layer is None or name.startswith("__"):
                raise
            if name == "weight" and layer.op.weight_name == "weight" and not is_distributed(layer.bare.weight):
                return layer.effective_weight()
            return getattr(layer.base_layer, name)

    @property
    def original_module(self) -> nn.Module:
        """What the wrapper stands around."""
        return self.token_adapter.base_layer

    @property
    def switch(self) -> Switch:
        """Which adapters are on."""
        return self.token_adapter.switch

    @property
    def target_name(self) -> str:
        """Full name of the module in the base model."""
        return self.token_adapter.target_name

    @property
    def op(self) -> Op:
        """The module's mathematics."""
        return self.token_adapter.op

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; one that is not there is no error."""
        self.token_adapter.remove_adapter(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the trained rows."""
        return self.token_adapter(*args, **kwargs)


__all__ = ["Found", "TrainableTokensLayer", "TrainableTokensWrapper"]
