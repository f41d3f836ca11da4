"""Base weights that take deltas: merging and unmerging, and what an initialisation takes out for good."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config.spec import AdapterSpec
from lorica.engines.kinds import is_distributed
from lorica.engines.rest import at_rest, unshard
from lorica.engines.site import Site
from lorica.errors import AdapterError
from lorica.init import Factors
from lorica.layers.holders import Light, begin_called
from lorica.layers.rewrites import Rewrite, carry_out, change_kernel, rewrite_packed
from lorica.layers.switch import Switch
from lorica.ops import Op
from lorica.storage import (
    Change,
    MergeError,
    Packed,
    Room,
    Term,
    add_low_rank_,
    change_of,
    first_not_finite,
    storage_of,
    stored_weight,
    write_values,
)
from lorica.variants import VARIANTS


class Merging(Light):
    """The half of an adapted layer that writes to the base weight; :class:`~lorica.layers.LoraLayer` is the other.

    Attributes:
        merged_adapters: names of the adapters that are in the base weight, in the order in which they went in.
        owed: adapters whose initial delta is still to be taken out of the base weight (see :meth:`subtract`).
        notes: what variants keep from one forward to the next.
        shared: parameters that the base layer shared with another before a merge gave it its own, by their names.
        merge_error: what the last merge into a quantised weight cost; None: nothing is merged, or it is not quantised.
        start_error: the same of the last start that changed the quantised weight (see :meth:`subtract`).
    """

    base_layer: Any
    op: Op
    site: Site | None
    switch: Switch
    target_name: str
    specs: dict[str, AdapterSpec]
    tied: Mapping[str, Merging]
    merged_adapters: list[str]
    owed: set[str]
    notes: dict[Any, Any]
    shared: dict[str, nn.Parameter]
    merge_error: MergeError | None
    start_error: MergeError | None
    _gains: dict[str, Tensor | None]
    # A list, since a bare parameter as an attribute would be registered as this module's own.
    _untied_from: list[nn.Parameter]
    _before: list[Packed]  # the quantised weight without what is merged

    def __init__(self, **attributes: Any) -> None:
        begin_called(self).update(
            merged_adapters=[],
            owed=set(),
            notes={},
            shared={},
            merge_error=None,
            start_error=None,
            _gains={},
            _untied_from=[],
            _before=[],
            **attributes,
        )

    def factors(self, name: str) -> Factors:
        """Return the factors of an adapter, attached to the graph."""
        raise NotImplementedError

    @property
    def untied_from(self) -> nn.Parameter | None:
        """The weight that the base layer shared with another module before a merge gave it its own."""
        return self._untied_from[0] if self._untied_from else None

    def give_own_weight(self) -> None:
        """Replace a base weight that another module shares with a copy, and remember the shared one."""
        shared = self.base_layer.weight
        self._untied_from = [shared]
        self.base_layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)

    def take_shared_weight(self) -> None:
        """Undo :meth:`give_own_weight`."""
        self.base_layer.weight = self._untied_from.pop()

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``s·B·A`` in the shape and orientation of the base weight, in the dtype of the factors.

        Raises:
            TargetError: the delta of this layer has no place in its weight (a grouped convolution).
        """
        factors = self.plain_factors(adapter)
        left, right = self.op.delta(self.base_layer, factors)
        wide = torch.promote_types(left.dtype, torch.float32)
        delta = (left.to(wide) @ right.to(wide)) * self.specs[adapter].scaling
        shape = self.stored.shape
        if self.op.roles_weight[0] == "expert":
            return delta.expand(len(left) if left.dim() == 3 else shape[0], -1, -1).to(factors.b.dtype)
        return delta.view(*left.shape[:1], *shape[1:]).to(factors.b.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add the deltas of adapters to the base weight, in place.

        A quantised weight is quantised anew, and a warning says what that cost (:attr:`merge_error`). What it was
        before is kept, for as long as something is merged: unmerging gives it back bit for bit.

        Args:
            safe_merge: look for NaN and infinity in the result before the weight is touched.
            adapter_names: which adapters; None: the active ones. Those already merged are passed over.

        Raises:
            AdapterError: the result is not finite (``safe_merge``), B has a bias and the base layer none, or the base
                weight is quantised in a form that cannot be written.
            TargetError: the delta of this layer has no place in its weight (a grouped convolution).
        """
        names = self.mergeable(self.switch.active if adapter_names is None else adapter_names)
        terms = self.check_merge(names, finite=safe_merge)
        carry_out([self.ready_to_merge(terms)] if terms else [])
        if names and self.merge_error is not None:
            warnings.warn(requantised_message([self]), stacklevel=3)

    def mergeable(self, names: Iterable[str]) -> list[str]:
        """Return those adapters of ``names`` that this layer has and that are not merged yet."""
        return [name for name in names if name in self.specs and name not in self.merged_adapters]

    def check_merge(self, names: Sequence[str], *, finite: bool, room: Room | None = None) -> dict[str, Term]:
        """Refuse a merge that cannot be done, before anything is touched; for the errors see :meth:`merge`.

        To be called without autograd.

        Args:
            names: adapters of this layer that are not merged.
            finite: compute the merged weight chunk by chunk and look for NaN and infinity.
            room: memory for a chunk of the weight, which all layers share; None: some is allocated where it is needed.

        Returns:
            What each adapter adds, for :meth:`ready_to_merge`. The matrices of plain LoRA are the factors themselves.
        """
        if not names:
            return {}
        if self.site is not None and self.site.unmergeable:
            raise AdapterError(f"{self.target_name}: nothing can be merged here: {self.site.unmergeable}")
        stored = self.stored
        self._check_writable(stored)
        terms = {name: self._checked_term(name) for name in names}
        if finite:
            self._check_finite(terms, stored, room)
        return terms

    def _checked_term(self, name: str) -> Term:
        layer: Any = self  # a LoraLayer
        spec = self.specs[name]
        variant = VARIANTS[spec.variant]
        if variant.unmergeable:
            raise AdapterError(f"{self.target_name}: adapter {name!r} cannot be merged: {variant.unmergeable}")
        if spec.bias and self.op.bias_of(self.base_layer) is None:
            raise AdapterError(
                f"{self.target_name}: B has a bias (lora_bias) and the base layer has none to merge it into"
            )
        factors = self.whole_factors(name)
        left, right = self._delta_at_rest(variant.plain(layer, factors, spec))
        gain = variant.gain(layer, factors, spec)
        if gain is not None and not gain.all():
            raise AdapterError(
                f"{self.target_name}: adapter {name!r} has magnitudes of zero, which would erase rows of the "
                "weight that no unmerging gives back"
            )
        self._gains[name] = gain
        return Term(left, right, spec.scaling, self._shaped(gain))

    def _check_finite(self, terms: Mapping[str, Term], stored: Tensor | Packed, room: Room | None) -> None:
        added = [(name, term) for name, term in terms.items() if not self._is_sources(name, stored)]
        values = stored.dequantize() if isinstance(stored, Packed) else stored
        matrix = values if self.op.roles_weight[0] == "expert" else values.flatten(1)
        form = storage_of(values, self.target_name)
        broken = first_not_finite(matrix, [term for _, term in added], form, room)
        if broken is not None:
            raise AdapterError(
                f"NaNs detected in the merged weights. The adapter {added[broken][0]} seems to be broken "
                f"({self.target_name})"
            )

    def ready_to_merge(self, terms: Mapping[str, Term], *, keep: bool = True) -> Rewrite:
        """Return what merges adapters, without a warning; to be called without autograd.

        Args:
            terms: what :meth:`check_merge` returned.
            keep: keep a quantised weight as it is now, to be given back by unmerging.
        """
        stored = self.stored
        if isinstance(stored, Packed):
            return Rewrite(partial(self._requantise, stored, terms, keep), partial(self._note_merged, terms))
        added = [term for name, term in terms.items() if not self._is_sources(name, stored)]
        return Rewrite(self._change_of(added, stored), partial(self._note_merged, terms))

    def _requantise(self, stored: Packed, terms: Mapping[str, Term], keep: bool, room: Room | None) -> None:
        # From the weight as it was, with all that is merged: errors do not add up.
        before = self._before[0] if self._before else stored.kept()
        all_terms = self._terms([*self.merged_adapters, *terms], before)
        self.merge_error = add_low_rank_(stored, all_terms, stored.storage, source=before)
        self._before = [before] if keep else []

    def _note_merged(self, terms: Mapping[str, Term]) -> None:
        self._add_biases(terms)
        self.merged_adapters.extend(terms)
        self.notes.clear()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged delta out of the base weight again.

        In float32 and float64 the weight comes back up to the rounding of one addition. A 16-bit weight was rounded
        when the delta went in; then a warning says so. A quantised weight comes back bit for bit.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        else:
            rewrite = self.ready_to_unmerge()
            carry_out([rewrite])
            if rewrite.inexact is not None:
                warnings.warn(inexact_message(rewrite.inexact), stacklevel=3)

    def unmerge_once(self) -> None:
        """Unmerge in a forward that finds the adapters turned off; of several threads the first one does."""
        with self.switch.turns.alone(self):
            if self.merged_adapters:
                self.unmerge()

    def ready_to_unmerge(self) -> Rewrite:
        """Return what takes all merged deltas out again, without a warning; to be called without autograd."""
        stored = self.stored
        if isinstance(stored, Packed) and self._before:
            return Rewrite(self._restore, self._note_unmerged)
        form = storage_of(stored, self.target_name)
        write = self._change_of(self._terms(self.merged_adapters, stored), stored, undo=True)
        return Rewrite(write, self._note_unmerged, None if form.exact else stored.dtype)

    def _restore(self, room: Room | None) -> None:
        stored = self.stored
        assert isinstance(stored, Packed)
        stored.restore(self._before.pop())

    def _note_unmerged(self) -> None:
        if self.merge_error is not None:
            self.merge_error = None
        self._add_biases(self.merged_adapters, sign=-1)
        self.merged_adapters.clear()
        self._gains.clear()
        self.notes.clear()

    def unmerged_weight(self) -> Tensor | Packed:
        """Return what this rank has of the base weight without the adapters that are merged into it; do not write.

        Of a quantised weight rows can be taken, each dequantised when it is asked for, where its form allows that.
        """
        stored = self._before[0] if self._before else self.stored
        here = bool(self._before) or not self.merged_adapters
        if isinstance(stored, Packed):
            if here and stored.storage.chunked:
                return stored
            stored = stored.dequantize()
        if here:
            return stored
        plain = stored.clone()
        with torch.no_grad():
            self._change_of(self._terms(self.merged_adapters, self.stored), plain, undo=True)(None)
        return plain

    @torch.no_grad()
    def subtract(self, name: str, factors: Factors, scale: float | None = None) -> None:
        """Take the delta of the factors that an adapter starts from out of the base weight, for good.

        Args:
            name: the adapter.
            factors: of plain LoRA; of which rank does not matter.
            scale: of their product; None: the adapter's.

        Raises:
            AdapterError: an adapter is merged into the weight, or the weight has no memory yet.
        """
        self._check_change(name)
        left, right = self._delta_at_rest(factors)
        scale = self.specs[name].scaling if scale is None else scale
        stored, terms = self.stored, [Term(left, right, -scale)]
        if isinstance(stored, Packed):
            self.start_error = add_low_rank_(stored, terms, stored.storage)
        else:
            self._change_of(terms, stored)(None)
        self.owed.discard(name)
        self.notes.clear()

    @torch.no_grad()
    def rewrite(self, name: str, values: Tensor) -> None:
        """Replace the base weight by what the start of an adapter leaves of it, for good.

        Args:
            name: the adapter.
            values: what this rank computes with, in the shape of its weight.

        Raises:
            AdapterError: an adapter is merged into the weight, or the weight has no memory yet.
        """
        self._check_change(name)
        stored = stored_weight(self.base_layer, self.op.weight_name)
        if isinstance(stored, Packed):
            self.start_error = write_values(stored, values.to(stored.device, torch.float32))
        else:
            held = at_rest(stored.data, self.site)
            storage_of(held.local, self.target_name).requantize(held.local, values[held.slices].to(held.local.device))
        self.owed.discard(name)
        self.notes.clear()

    def _check_change(self, name: str) -> None:
        """Refuse to change the base weight for good."""
        stored = self.stored
        self._check_writable(stored)
        if self.merged_adapters or stored.is_meta:
            state = f"has {self.merged_adapters} merged into it" if self.merged_adapters else "has no memory yet"
            raise AdapterError(
                f"{self.target_name}: the start of adapter {name!r} changes the base weight, which {state}"
            )

    @property
    def stored(self) -> Tensor | Packed:
        """What this rank holds of the base layer's weight that the deltas belong to, detached, as it is stored."""
        weight = stored_weight(self._modules["base_layer"], self.op.weight_name)
        if isinstance(weight, Packed):
            return weight
        return at_rest(weight.data).local if is_distributed(weight) else weight.data

    @property
    def base_weight(self) -> Tensor:
        """The values of :attr:`stored`: itself, or those of a quantised weight, all of them, in float32."""
        stored = self.stored
        return stored.dequantize() if isinstance(stored, Packed) else stored

    def _check_writable(self, stored: Tensor | Packed) -> None:
        storage_of(stored, self.target_name)
        if not isinstance(stored, Packed):
            return
        reason = stored.refusal
        if stored.divided:
            reason = "ranks hold shards of its numbers, which are only made all together; merge on one process"
        if reason:
            raise AdapterError(f"{self.target_name}: a weight stored as {stored.kind} cannot take a delta: {reason}")

    def whole_factors(self, name: str) -> Factors:
        """Return an adapter's factors as they are in a forward, detached: gathered where they are sharded at rest."""
        factors = self.factors(name)
        if factors.bias is None and not factors.extras:
            return Factors(unshard(factors.a.detach()), unshard(factors.b.detach()))
        return factors.map(lambda tensor: unshard(tensor.detach()))

    def plain_factors(self, name: str) -> Factors:
        """Return the factors of plain LoRA that an adapter amounts to, as they are in a forward, detached."""
        layer: Any = self  # a LoraLayer
        with torch.no_grad():
            return VARIANTS[self.specs[name].variant].plain(layer, self.whole_factors(name), self.specs[name])

    def _terms(self, names: Iterable[str], weight: Tensor | Packed) -> list[Term]:
        """Return what adapters that were checked have added to a weight, or are to add."""
        layer: Any = self  # a LoraLayer
        terms = []
        for name in names:
            if not self._is_sources(name, weight):
                spec = self.specs[name]
                left, right = self._delta_at_rest(VARIANTS[spec.variant].plain(layer, self.whole_factors(name), spec))
                terms.append(Term(left, right, spec.scaling, self._shaped(self._gains.get(name))))
        return terms

    def _is_sources(self, name: str, weight: Tensor | Packed) -> bool:
        """Whether the adapter is tied to a layer with the same memory, whose delta is then this one's too."""
        return name in self.tied and self.tied[name].stored.data_ptr() == weight.data_ptr()

    def _shaped(self, gain: Tensor | None) -> Tensor | None:
        return gain if gain is None else gain.view((-1, 1) if self.op.roles_weight[0] == "out" else (1, -1))

    def _change_of(self, terms: Sequence[Term], weight: Tensor | Packed, *, undo: bool = False) -> Change:
        form = storage_of(weight, self.target_name)
        if isinstance(weight, Packed):
            return partial(rewrite_packed, weight, terms, undo)
        if weight.dim() == 2 or self.op.roles_weight[0] == "expert":
            return change_of(weight, terms, form, undo=undo)
        return partial(change_kernel, weight, terms, form, undo)

    def _delta_at_rest(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return the factors of the delta of the weight that this rank keeps between forwards."""
        base = self._modules["base_layer"]
        left, right = self.op.delta(base, factors)
        if not is_distributed(getattr(base, self.op.weight_name, None)):
            return left, right
        if self.op.roles_weight[0] != "expert":
            rows, columns = self.share_at_rest()
            return left[rows], right[:, columns]
        experts, rows, columns = at_rest(getattr(self.base_layer, self.op.weight_name).data, self.site).slices
        if left.dim() == 3:
            left, right = left[experts], right[experts]
        return left[..., rows, :], right[..., columns]

    def share_at_rest(self) -> tuple[slice, slice]:
        """Return which rows and columns of this rank's delta belong to the weight that it keeps between forwards."""
        stored = stored_weight(self.base_layer, self.op.weight_name)
        if isinstance(stored, Packed):
            return slice(None), slice(None)
        held = at_rest(stored.data, self.site)
        rows, *others = held.slices
        if len(others) > 1 and any(other != slice(None) for other in others):
            raise AdapterError(f"{self.target_name}: a kernel that is sharded along {held.slices} cannot take a delta")
        return rows, others[0] if len(others) == 1 else slice(None)

    def _add_biases(self, names: Iterable[str], sign: int = 1) -> None:
        for name in names:
            bias = self.whole_factors(name).bias if self.specs[name].bias else None
            if bias is not None:
                held = at_rest(self.op.bias_of(self.base_layer).data, self.site)
                held.local.add_(bias[held.slices].to(held.local), alpha=sign * self.specs[name].scaling)


def inexact_message(dtype: torch.dtype) -> str:
    """Return what is to be said when a 16-bit weight is unmerged."""
    return (
        f"Unmerged from weights stored as {dtype}: they were rounded when the delta went in, so the base weight is "
        "restored to within one rounding of that dtype, not bit for bit. Reload the base model where that matters."
    )


def requantised_message(layers: Sequence[Merging]) -> str:
    """Return what is to be said when quantised weights were merged into; the errors are the largest of ``layers``."""
    return (
        f"Merged into {len(layers)} weight(s) {_cost([(layer, layer.merge_error) for layer in layers])} Where outputs "
        "matter, leave the adapter unmerged, or merge into the model as it was before it was quantised."
    )


def warn_of_starts(layers: Iterable[Merging]) -> None:
    """Say what it cost that a start of an adapter changed quantised weights, if one did."""
    changed = [(layer, layer.start_error) for layer in layers if layer.start_error is not None]
    if changed:
        warnings.warn(
            f"The adapter's start was taken out of {len(changed)} weight(s) {_cost(changed)} So the model does not "
            "start exactly as it was; starting before it is quantised costs less.",
            stacklevel=4,
        )


def _cost(changed: Sequence[tuple[Merging, MergeError | None]]) -> str:
    worst, error = max(changed, key=lambda pair: pair[1].delta if pair[1] is not None else 0.0)
    stored = worst.stored
    assert isinstance(stored, Packed)
    assert error is not None
    return (
        f"stored as {stored.kind}, which were quantised anew. What is stored is off the wanted weight by up to "
        f"{error.weight:.2%} of it, which is {error.delta:.0%} of the change ({worst.target_name})."
    )
